"""Images in the folders that the official evaluators of benchmarks read.

In the out folder, for each set of images (checkpoint, reference, or checkpoint_cfg_1.5 of several guidances):

geneval (https://github.com/djghosh13/geneval, arXiv:2310.11513)
    geneval/<set>/<prompt:05d>/metadata.jsonl and samples/<sample:05d>.png, for evaluation/evaluate_images.py.
geneval2 (https://github.com/facebookresearch/GenEval2, arXiv:2512.16853)
    geneval2/geneval2_data.jsonl, and of each sample geneval2/<set>/images_<sample:05d>.json, from prompt to image: what
    evaluation.py takes as benchmark_data and image_filepath_data.
t2i_compbench (https://github.com/Karine-Huang/T2I-CompBench, arXiv:2307.06350)
    t2i_compbench/<set>/<category>/samples/<prompt>_<number:06d>.png. The evaluators of a category take the folder
    t2i_compbench/<set>/<category>/ and write their results into it.

A prompt's number is its row in the file of prompts; a number of T2I-CompBench counts the images of a category, the
samples of a prompt one after the other.

Axes: N image of a chunk; H, W pixels.
"""

from __future__ import annotations

import errno
import json
import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
from PIL import Image

from varfast.evaluation.asked import Asked
from varfast.evaluation.config import BenchmarkName
from varfast.evaluation.plan import Plan
from varfast.files import save_text
from varfast.printable import printable
from varfast.types import InputError

BENCHMARKS = get_args(BenchmarkName)
DATA_FILE = "geneval2_data.jsonl"
_NAME_BYTES = 255  # of a file
# What each row of the benchmark's own file has, beside the prompt.
_KEYS = {"geneval": ("tag", "include"), "geneval2": ("atom_count", "vqa_list", "skills"), "t2i_compbench": ("tag",)}
_FILES = {
    "geneval": "prompts/evaluation_metadata.jsonl of GenEval",
    "geneval2": "geneval2_data.jsonl of GenEval 2",
    "t2i_compbench": "examples/dataset/color_val.txt of T2I-CompBench, or another file there",
}


class Export:
    """Writes the images of an evaluation as the evaluator of a benchmark reads them.

    Args:
        folder: of the evaluation.
        benchmark: whose.
        prompts: that are sampled, with what the benchmark's file says of each.
        samples: images a prompt.
    Raises: InputError for prompts that are not the benchmark's, or that cannot be names of files.
    """

    def __init__(self, folder: Path, benchmark: BenchmarkName, prompts: Sequence[Asked], samples: int) -> None:
        self._folder, self._benchmark, self._samples = folder, benchmark, samples
        self._prompts = {prompt.id: prompt for prompt in prompts}
        self._first = first_numbers(prompts, samples)
        for prompt in prompts:
            self._check(prompt)
        if benchmark == "geneval2":
            twice = [text for text, count in Counter(prompt.text for prompt in prompts).items() if count > 1]
            if twice:
                raise InputError(
                    f"export=geneval2: its evaluator finds images by their prompt, and '{printable(twice[0], 80)}' is "
                    "there more than once; leave the other rows out"
                )

    def _check(self, prompt: Asked) -> None:
        where = f"export={self._benchmark}: prompt {prompt.id} ('{printable(prompt.text, 60)}')"
        missing = [key for key in _KEYS[self._benchmark] if key not in prompt.row]
        if missing:
            raise InputError(f"{where} has no {missing[0]}; prompts wants {_FILES[self._benchmark]}")
        if self._benchmark != "t2i_compbench":
            return
        for text in (prompt.tag, prompt.text):
            if "/" in text or "\0" in text or text.strip() in ("", ".", ".."):
                raise InputError(f"{where}: '{printable(text, 60)}' cannot be the name of a file, as the benchmark has")
        if "_" in prompt.text:
            raise InputError(f"{where} holds _, where the evaluators take a prompt to end in the name of a file")
        if len(self._t2i_name(prompt, 0).encode()) > _NAME_BYTES:
            raise InputError(f"{where} is too long for the name of a file, of {_NAME_BYTES} bytes")

    def save(self, name: str, levels: np.ndarray, plan: Plan, chunk: Sequence[int]) -> None:
        """Write the images (N, H, W, 3) of a chunk. name: of their set. Raises: InputError if the disk does not let it.

        Not atomic: the chunk's own file is written afterwards, and until then all its images count as missing.
        """
        for picture, index in zip(levels, chunk, strict=True):
            prompt, sample = self._prompts[plan.label(index)], plan.sample(index)
            folder, file = self._place(name, prompt, sample)
            save_png(self._folder, folder, file, picture)

    def finish(self, name: str) -> str:
        """Write what the evaluator reads beside the images. Returns: the folder of the set, below the out folder.

        Raises: InputError if an image is gone, or the disk does not let it.
        """
        below = Path(self._benchmark) / name
        places = [self._place(name, prompt, s) for prompt in self._prompts.values() for s in range(self._samples)]
        gone = [path for folder, file in places if not (path := self._folder / folder / file).is_file()]
        if gone:
            raise InputError(
                f"export={self._benchmark}: {len(gone)} exported images are gone, {gone[0]} first; delete "
                f"{self._folder / 'chunks'} too, or choose another out folder, and run the command again"
            )
        if self._benchmark == "geneval":
            for prompt in self._prompts.values():
                folder = _own_folder(self._folder, self._place(name, prompt, 0)[0].parent)
                save_text(folder / "metadata.jsonl", json.dumps(prompt.row))
        if self._benchmark == "geneval2":
            folder = _own_folder(self._folder, below)
            rows = [json.dumps(prompt.row) + "\n" for prompt in self._prompts.values()]
            save_text(folder.parent / DATA_FILE, "".join(rows))
            for sample in range(self._samples):
                places_of = {prompt.text: self._place(name, prompt, sample) for prompt in self._prompts.values()}
                paths = {
                    text: str((self._folder / place / file).resolve()) for text, (place, file) in places_of.items()
                }
                save_text(folder / f"images_{sample:05d}.json", json.dumps(paths, indent=1) + "\n")
        return str(below)

    def _place(self, name: str, prompt: Asked, sample: int) -> tuple[Path, str]:
        """Folder below the out folder, and file, of an image."""
        below = Path(self._benchmark) / name
        if self._benchmark == "geneval":
            return below / f"{prompt.id:05d}" / "samples", f"{sample:05d}.png"
        if self._benchmark == "geneval2":
            return below / "images", f"{prompt.id:05d}_{sample:05d}.png"
        return below / prompt.tag / "samples", self._t2i_name(prompt, sample)

    def _t2i_name(self, prompt: Asked, sample: int) -> str:
        return f"{prompt.text}_{self._first[prompt.id] + sample:06d}.png"


def next_steps(out: Path, result: dict[str, Any]) -> str:
    """What to run on exported images, and then here, from the content of evaluation.json."""
    benchmark, written = result["settings"]["export"], {}
    lines = [f"The images stand in {out / benchmark}. In a clone of the benchmark's repository:"]
    for name, below in result["exported"].items():
        folder = (out / below).resolve()
        if benchmark == "geneval":
            written[name] = [str(folder.parent / f"results_{name}.jsonl")]
            arguments = shlex.join([str(folder), "--outfile", *written[name]])
            lines.append(f"  python evaluation/evaluate_images.py {arguments} --model-path DETECTOR")
        elif benchmark == "geneval2":
            lists = [folder / f"images_{sample:05d}.json" for sample in range(result["settings"]["samples_per_prompt"])]
            written[name] = [str(path.with_name(path.name.replace("images", "scores"))) for path in lists]
            for path, scores in zip(lists, written[name], strict=True):
                data = ["--benchmark_data", str(folder.parent / DATA_FILE), "--image_filepath_data", str(path)]
                lines.append(f"  python evaluation.py {shlex.join([*data, '--output_file', scores])} "
                             "--method soft_tifa_gm")  # fmt: skip
        else:
            written[name] = [str(folder)]
            categories = sorted(path for path in folder.iterdir() if path.is_dir())
            lines += [f"  its evaluators, with the folder {shlex.quote(f'{category}/')}" for category in categories]
    where = [result["checkpoint"], f"out={out}", f"results={json.dumps(written)}"]
    back = f"  python -m varfast.evaluate {shlex.join(where)}"
    return "\n".join([*lines, "and then, to read what they wrote into the table:", back])


def first_numbers(prompts: Sequence[Asked], samples: int) -> dict[int, int]:
    """Of each prompt by its id: T2I-CompBench's number of its first image, among the images of its category."""
    counts: Counter[str] = Counter()
    found = {}
    for prompt in prompts:
        found[prompt.id] = counts[prompt.tag]
        counts[prompt.tag] += samples
    return found


def save_png(out: Path, below: Path, name: str, picture: np.ndarray) -> None:
    """Write an (H, W, 3) picture into a folder below the out folder. Raises: InputError if the disk does not let it."""
    folder = _own_folder(out, below)
    try:
        (folder / name).unlink(missing_ok=True)  # a link would be followed, and its target overwritten
        with (folder / name).open("xb") as file:
            Image.fromarray(picture).save(file, format="PNG")
    except OSError as error:
        raise _refused(folder, error) from error


def _own_folder(out: Path, below: Path) -> Path:
    """A folder below the out folder, made where it is missing. Raises: InputError if a part of it is a link."""
    path = out
    for part in below.parts:
        path = path / part
        try:
            path.mkdir(parents=True, exist_ok=True)
            if path.is_symlink():
                raise OSError(errno.ELOOP, "it is a link")
        except OSError as error:
            raise _refused(path, error) from error
    return path


def _refused(folder: Path, error: OSError) -> InputError:
    return InputError(f"cannot write into {folder}: {error.strerror}; free space there and go on")
