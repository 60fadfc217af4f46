"""The cache of base models: one for each config, data set and version of the code, made when it is first needed."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from varfast.config import Config
from varfast.data.captioned import captions_fingerprint, load_captioned
from varfast.data.datasets import CAPTIONED, LABELLED, FolderImages, Images, fingerprint, load_images
from varfast.data.labels import LABELS_FILE, Label, caption, drawn_labels, labels_json, labels_of
from varfast.files import read_json, remove_leftovers, save_tensors, save_text
from varfast.policies.families import family_of
from varfast.policies.janus.text import TextTokenizer
from varfast.policies.janus.transformer import Janus
from varfast.policies.text import TOKENIZER_FILE
from varfast.pretraining.training import PretrainReport, pretrain
from varfast.randomness import GRID_STEP, Key, order_may_vary
from varfast.runs.base import FileNote
from varfast.runs.lock import locked
from varfast.runs.pictures import image_grid, save_picture
from varfast.types import Prompts, Sampling

# Bounds of advice(), and how many images the pictures of a user's own base show.
_BLURRED, _CODES_USED, _NEAR_GUESSING = 0.1, 0.5, 0.8
_SHOWN_IMAGES = 8


def base_paths(config: Config, device: torch.device) -> tuple[Path, Path]:
    """Where the transformer and the VQ-VAE of this config are kept, whether they exist or not."""
    trained, frozen = config.policy.parts
    made_by = {
        "policy": config.policy.model_dump(exclude={"lora"}),
        "pretrain": config.pretrain.model_dump(exclude={"cache_dir", "num_workers"}),
        "data": (captions_fingerprint if _of_texts(config) else fingerprint)(config.pretrain.dataset),
        "seed": config.run.seed,
        "device": device.type,
        "torch": torch.__version__,
        "code": _code_digest(config.policy.family),
    }
    key = hashlib.sha256(json.dumps(made_by, sort_keys=True).encode()).hexdigest()[:16]
    folder = Path(config.pretrain.cache_dir).expanduser() / key
    return folder / f"{trained}.pth", folder / f"{frozen}.pth"


def _code_digest(family: str) -> str:
    """Digest of the sources that a base model depends on: those of its family, and those that all families share."""
    package = Path(__file__).parent.parent
    others = {path.parent for path in (package / "policies").glob("*/build.py")} - {package / "policies" / family}
    digest = hashlib.sha256()
    for path in [
        *sorted((package / "pretraining").glob("*.py")),
        package / "optim" / "schedule.py",
        *sorted((package / "data").glob("*.py")),
        *sorted(path for path in (package / "policies").rglob("*.py") if path.parent not in others),
    ]:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def pretrained(config: Config, device: torch.device) -> tuple[Path, Path]:
    """The files of transformer and VQ-VAE for this config, trained now unless the cache holds them undamaged.

    If several processes want the same base at once, on one machine or several, one makes it and the others wait.

    Raises: InputError if the cache cannot be written, which is checked before anything is trained; or as pretrain.
    """
    paths = base_paths(config, device)
    kept = _kept(config, paths)
    if _damage(kept) is None:
        return paths
    folder = paths[0].parent
    with locked(folder, f"the base model in {folder}", "choose another pretrain.cache_dir", math.inf):
        damage = _damage(kept)  # another process may have made it meanwhile
        if damage is None:
            return paths
        remove_leftovers(folder)
        if damage:
            print(f"base model in {folder}: {damage}; it is made again")
        # A base is made once and kept, so it need not be repeatable. All of its operations seem to sum in a fixed order
        # since upsampling is a matrix product, but that has not been tried on a GPU.
        with order_may_vary():
            try:
                *models, report = pretrain(config, device)
            except KeyboardInterrupt as error:
                error.add_note("  pre-training keeps nothing of a base model that is not complete: it starts again")
                raise
        if _of_texts(config):
            _text_of(models[0]).save(folder / TOKENIZER_FILE)
        elif (labels := _labels(config)) is not None:
            save_text(folder / LABELS_FILE, labels_json(labels))
        for path, model in zip(paths, models, strict=True):
            save_tensors(path, model.state_dict())
        # Written last: without it, the other files count as missing.
        files = {path.name: FileNote.of(path).model_dump() for path in kept}
        save_text(_report(kept), json.dumps(asdict(report) | {"files": files}, indent=2) + "\n")
        print(
            f"base model: {report.seconds:.0f} s; reconstruction MSE {report.reconstruction_mse:.4f}, "
            f"{report.codebook_usage:.0%} of the codes in use, {report.token_loss:.2f} nats a token"
        )
        if _is_own(config):
            _show_own(config, models, report, folder, device)
    return paths


def _of_texts(config: Config) -> bool:
    return config.policy.conditioned_on == "text"


def _is_own(config: Config) -> bool:
    """Whether the base learns from images of the user's."""
    return config.pretrain.dataset not in (*LABELLED, *CAPTIONED)


def _kept(config: Config, paths: tuple[Path, Path]) -> list[Path]:
    """All files of a base: its two parts, and the text tokenizer."""
    return [*paths, paths[0].with_name(TOKENIZER_FILE)] if _of_texts(config) else list(paths)


def _report(paths: Sequence[Path]) -> Path:
    return paths[0].with_name("report.json")


def _damage(paths: Sequence[Path]) -> str | None:
    """What is wrong with a base model in the cache: None if it is whole, an empty text if there is none."""
    report = _report(paths)
    if not any(path.exists() for path in (report, *paths)):
        return ""
    try:
        files = read_json(report)["files"]
        notes = [FileNote.model_validate(files[path.name]) for path in paths]
    except (ValueError, LookupError, TypeError):
        return f"{report.name} does not say what belongs there"
    found = {path.name: note.differs(path) for path, note in zip(paths, notes, strict=True)}
    return next((f"{name} {problem}" for name, problem in found.items() if problem), None)


def _labels(config: Config) -> list[Label] | None:
    """What the labels of the base are called; None for the digits, whose names are their numbers."""
    if config.pretrain.dataset == "shapes":
        return drawn_labels()
    return labels_of(_own_images(config)) if _is_own(config) else None


def _own_images(config: Config) -> FolderImages:
    images = load_images(config.pretrain.dataset, config.policy.image_size, check=False)
    assert isinstance(images, FolderImages)
    return images


def _text_of(model: nn.Module) -> TextTokenizer:
    """What a pre-trained model reads texts with."""
    assert isinstance(model, Janus)
    assert model.text is not None
    return model.text


def _show_own(
    config: Config, models: Sequence[nn.Module], report: PretrainReport, folder: Path, device: torch.device
) -> None:
    """For a base of a user's own images: print what its numbers mean, and save pictures beside it."""
    images: Images
    if _of_texts(config):
        images = captioned = load_captioned(config.pretrain.dataset, config.policy.image_size, 0, check=False)
        titles, beside = captioned.texts[:_SHOWN_IMAGES], TOKENIZER_FILE
    else:
        images = labelled = _own_images(config)
        labels = labels_of(labelled)
        names, beside = [label.name for label in labels], LABELS_FILE
        titles = [caption(row.label, names) for row in labels[:_SHOWN_IMAGES]]
    print("\n".join(f"  {line}" for line in advice(report, config)))
    last = len(images) - 1
    shown = sorted({i * last // (_SHOWN_IMAGES - 1) for i in range(_SHOWN_IMAGES)})
    real = torch.stack([images[i][0] for i in shown]).to(device)
    policy = family_of(config.policy).assemble(dict(zip(config.policy.parts, models, strict=True)), device, "float32")
    rebuilt = policy.decode(policy.encode(real))
    save_picture(
        folder / "reconstructions.png", image_grid(torch.cat([real, rebuilt]), len(shown), ["image", "rebuilt"])
    )
    prompts = Prompts(torch.arange(len(titles))).repeat(_SHOWN_IMAGES)
    _, samples = policy.sample_images(prompts, Sampling(), Key(config.run.seed, GRID_STEP), _SHOWN_IMAGES)
    save_picture(folder / "samples.png", image_grid(samples, _SHOWN_IMAGES, titles))
    print(f"  {folder}: reconstructions.png, samples.png, {beside}")


def advice(report: PretrainReport, config: Config) -> list[str]:
    """What the numbers of a base mean and what to do about them, by rules of thumb from small runs."""
    lost = report.reconstruction_mse / max(report.pixel_variance, 1e-12)
    guessing = math.log(config.policy.vocab_size)
    vqvae, var = config.pretrain.vqvae_steps, config.pretrain.var_steps
    lines = [f"reconstruction MSE: {lost:.0%} of the pixels' variance is lost by the VQ-VAE (0 %: none, 100 %: all but "
             "the mean colour)" + (f"; blurred above 10 %: raise pretrain.vqvae_steps={vqvae}, as to {4 * vqvae}"
                                   if lost > _BLURRED else "")]  # fmt: skip
    fewer = f"take fewer codes than {config.policy.sizes_key}.vocab_size={config.policy.vocab_size}"
    lines.append("codes in use: the share of the vocabulary that the last images needed" + (
        f"; below {_CODES_USED:.0%}: raise pretrain.vqvae_steps, or {fewer}"
        if report.codebook_usage < _CODES_USED else ""))  # fmt: skip
    lines.append(f"nats a token: guessing costs {guessing:.2f}; samples take shape as this falls" + (
        f". It is near guessing: raise pretrain.var_steps={var}, as to {4 * var}"
        if report.token_loss > _NEAR_GUESSING * guessing else ""))  # fmt: skip
    return lines
