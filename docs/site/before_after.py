"""A picture for these pages: what a run drew before it was trained and after, the same prompts and random numbers.

    python docs/site/before_after.py runs/shapes three docs/shapes.png "red star" "blue heart" --columns 6

Images that earn the reward have a green frame.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from varfast.data.labels import label_names
from varfast.data.prompts import saved_prompts
from varfast.policies.text import reads_texts
from varfast.randomness import Key
from varfast.rewards import WeightedSum
from varfast.runs.folder import RunFolder
from varfast.runs.load import load_base, load_run
from varfast.types import Prompts, Sampling

GAP, FRAME, TITLE = 4, 3, 26
EARNED = (0.13, 0.62, 0.30)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("reward", help="its name in the config; 1 earns a frame")
    parser.add_argument("out")
    parser.add_argument("prompts", nargs="+", help="names of labels, or prompts of the run")
    parser.add_argument("--columns", type=int, default=6)
    parser.add_argument("--seed", type=int, default=7)
    given = parser.parse_args()
    folder, device = RunFolder(Path(given.run)), torch.device("cpu")
    config = folder.load_config()
    before, after = load_base(config, folder, device, "float32"), load_run(folder, device, "float32")
    if reads_texts(after):
        table = saved_prompts(Path(given.run))
        names = table.texts
        for policy in (before, after):
            policy.set_prompts(names)
        reward = WeightedSum({given.reward: config.reward[given.reward]}, prompts=table)
    else:
        names = label_names(given.run, after.num_classes)
        reward = WeightedSum({given.reward: config.reward[given.reward]}, num_classes=len(names), names=names)
    ids = torch.tensor([names.index(name) for name in given.prompts]).repeat_interleave(given.columns)
    how = Sampling(temperature=config.rollout.temperature)
    halves = []
    for policy in (before, after):
        _, images = policy.sample_images(Prompts(ids), how, Key(given.seed))
        earned = reward(images, ids).components[given.reward] >= 1.0
        halves.append(_grid(images, earned, given.columns))
    picture = _titled(halves, given.prompts)
    picture.quantize(256).save(given.out, optimize=True)
    print(f"{given.out}: {Path(given.out).stat().st_size / 1e3:.0f} kB")


def _grid(images: torch.Tensor, earned: torch.Tensor, columns: int) -> np.ndarray:
    """(rows, width, 3) uint8: images enlarged to 64 pixels, in frames."""
    enlarge = max(1, 64 // images.shape[-1])
    images = images.repeat_interleave(enlarge, 2).repeat_interleave(enlarge, 3)
    rows = []
    for image, good in zip(images, earned.tolist(), strict=True):
        side = image.shape[-1] + 2 * FRAME
        cell = torch.ones(3, side + GAP, side + GAP)
        cell[:, :side, :side] = torch.tensor(EARNED).view(3, 1, 1) if good else 1.0
        cell[:, FRAME : FRAME + image.shape[1], FRAME : FRAME + image.shape[2]] = image
        rows.append(cell)
    lines = [torch.cat(rows[first : first + columns], 2) for first in range(0, len(rows), columns)]
    return torch.cat(lines, 1).mul(255).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()


def _titled(halves: list[np.ndarray], prompts: list[str]) -> Image.Image:
    """Before and after side by side, with the prompts left of them."""
    font, bold = ImageFont.load_default(14), ImageFont.load_default(17)
    left = max(int(font.getlength(prompt)) for prompt in prompts) + 12
    height, width = halves[0].shape[:2]
    picture = Image.new("RGB", (left + 2 * width + 20, TITLE + height), "white")
    draw = ImageDraw.Draw(picture)
    for index, (title, half) in enumerate(zip(("before", "after"), halves, strict=True)):
        x = left + index * (width + 20)
        draw.text((x + width // 2, TITLE // 2), title, fill="black", font=bold, anchor="mm")
        picture.paste(Image.fromarray(half), (x, TITLE))
    for row, prompt in enumerate(prompts):
        y = TITLE + (2 * row + 1) * height // (2 * len(prompts)) - GAP // 2
        draw.text((left - 8, y), prompt, fill="black", font=font, anchor="rm")
    return picture


if __name__ == "__main__":
    main()
