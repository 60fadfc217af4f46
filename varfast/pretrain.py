"""Make a base model from images: first the VQ-VAE, then the transformer on its tokens.

    python -m varfast.pretrain configs/digits.yaml [a.b=c ...]

The result is kept in pretrain.cache_dir under a hash of all that made it; `varfast.train` comes here by itself when its
config says policy.checkpoint: pretrain and the cache is empty. Small on purpose: no adversarial or perceptual loss.

Axes: B image, L token over all scales, V vocabulary.
"""

from __future__ import annotations

if __name__ == "__main__":  # --help and a typo are answered before the imports below, which take 6 s
    from varfast.command import run_command

    run_command("pretrain")

import hashlib
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset, default_collate

from varfast.command import read_config
from varfast.config import Config
from varfast.data.datasets import FolderImages, Images, fingerprint, load_images
from varfast.data.labels import LABELS_FILE, caption, label_table, labels_json, labels_of
from varfast.files import read_json, remove_leftovers, save_tensors, save_text
from varfast.optim.schedule import scheduled
from varfast.policies.device import pick_device
from varfast.policies.var.policy import VARPolicy
from varfast.policies.var.tokenizer import VQVAE
from varfast.policies.var.transformer import VAR
from varfast.progress import Progress
from varfast.randomness import GRID_STEP, Key, order_may_vary
from varfast.runs.base import FileNote
from varfast.runs.lock import locked
from varfast.runs.pictures import image_grid, save_picture
from varfast.runs.signals import listen
from varfast.types import InputError, NotFinitePolicy, Prompts, Sampling

_GRAD_CLIP = 1.0
# Every so many batches, codes that none of them used are moved to where the data is.
_REVIVE_EVERY = 25
# Steps between plain lines, off a terminal; a step of the digits' base takes 20 to 100 ms on a CPU.
_LINE_EVERY = 100
# For advice() and the pictures of a user's own base.
_BLURRED, _CODES_USED, _NEAR_GUESSING = 0.1, 0.5, 0.8
_SHOWN_IMAGES = 8


@dataclass(frozen=True)
class PretrainReport:
    """What pre-training measured.

    Attributes:
        reconstruction_mse: of pixels in [-1, 1], mean over the last batches.
        pixel_variance: of the images around their mean colour, in the same units: a VQ-VAE that has learned nothing
            else has this error.
        codebook_usage: share of the codes that one pass over the last batches used.
        token_loss: cross-entropy of the transformer, nats a token, mean over the last batches.
        seconds: wall time of both trainings.
    """

    reconstruction_mse: float
    pixel_variance: float
    codebook_usage: float
    token_loss: float
    seconds: float


def base_paths(config: Config, device: torch.device) -> tuple[Path, Path]:
    """Where the transformer and the VQ-VAE of this config are kept, whether they exist or not."""
    made_by = {
        "var": config.policy.sizes.model_dump(),
        "vqvae": config.policy.vqvae.model_dump(),
        "pretrain": config.pretrain.model_dump(exclude={"cache_dir", "num_workers"}),
        "data": fingerprint(config.pretrain.dataset),
        "seed": config.run.seed,
        "device": device.type,
        "torch": torch.__version__,
        "code": _code_digest(),
    }
    key = hashlib.sha256(json.dumps(made_by, sort_keys=True).encode()).hexdigest()[:16]
    folder = Path(config.pretrain.cache_dir).expanduser() / key
    return folder / "var.pth", folder / "vqvae.pth"


def _code_digest() -> str:
    """Digest of the sources that decide what a base model is."""
    here = Path(__file__).parent
    digest = hashlib.sha256()
    for path in [
        here / "pretrain.py",
        here / "optim" / "schedule.py",
        *sorted((here / "data").glob("*.py")),
        *sorted((here / "policies").rglob("*.py")),
    ]:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def pretrained(config: Config, device: torch.device) -> tuple[Path, Path]:
    """The transformer's and the VQ-VAE's checkpoint for this config, trained now if they are not whole in the cache.

    Of several processes that want the same base at once, on whatever machines, one makes it and the others wait.

    Raises: InputError if the cache cannot be written, which is tried before anything is trained; or as pretrain.
    """
    paths = base_paths(config, device)
    if _damage(paths) is None:
        return paths
    folder = paths[0].parent
    with locked(folder, f"the base model in {folder}", "choose another pretrain.cache_dir", math.inf):
        damage = _damage(paths)  # another process may have made it meanwhile
        if damage is None:
            return paths
        remove_leftovers(folder)
        if damage:
            print(f"base model in {folder}: {damage}; it is made again")
        # The base is made once and kept. No operation of it is known to lack a fixed order now that upsampling is a
        # product; on a GPU that has not been tried.
        with order_may_vary():
            try:
                var, vqvae, report = pretrain(config, device)
            except KeyboardInterrupt as error:
                error.add_note("  pre-training keeps nothing of a base model that is not complete: it starts again")
                raise
        if config.pretrain.dataset != "digits":
            save_text(folder / LABELS_FILE, labels_json(labels_of(_own_images(config))))
        for path, model in zip(paths, (var, vqvae), strict=True):
            save_tensors(path, model.state_dict())
        # Last: without it, the files count as missing.
        files = {path.name: FileNote.of(path).model_dump() for path in paths}
        save_text(_report(paths), json.dumps(asdict(report) | {"files": files}, indent=2) + "\n")
        print(
            f"base model: {report.seconds:.0f} s; reconstruction MSE {report.reconstruction_mse:.4f}, "
            f"{report.codebook_usage:.0%} of the codes in use, {report.token_loss:.2f} nats a token"
        )
        if config.pretrain.dataset != "digits":
            _show_own(config, var, vqvae, report, folder, device)
    return paths


def _report(paths: tuple[Path, Path]) -> Path:
    return paths[0].with_name("report.json")


def _damage(paths: tuple[Path, Path]) -> str | None:
    """What is wrong with a base model in the cache: None if it is whole, "" if there is none."""
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


def _own_images(config: Config) -> FolderImages:
    images = load_images(config.pretrain.dataset, config.policy.vqvae.image_size, check=False)
    assert isinstance(images, FolderImages)
    return images


def _show_own(
    config: Config, var: VAR, vqvae: VQVAE, report: PretrainReport, folder: Path, device: torch.device
) -> None:
    """For images of a user's own: what the numbers mean, and pictures beside the base."""
    images = _own_images(config)
    labels = labels_of(images)
    print("\n".join(f"  {line}" for line in advice(report, config)))
    shown = sorted({i * (len(images) - 1) // (_SHOWN_IMAGES - 1) for i in range(_SHOWN_IMAGES)})
    real = torch.stack([images[i][0] for i in shown]).to(device)
    policy = VARPolicy(var, vqvae, device)
    rebuilt = policy.decode(policy.encode(real))
    save_picture(
        folder / "reconstructions.png", image_grid(torch.cat([real, rebuilt]), len(shown), ["image", "rebuilt"])
    )
    rows = labels[:_SHOWN_IMAGES]
    prompts = Prompts(torch.tensor([row.label for row in rows])).repeat(_SHOWN_IMAGES)
    _, samples = policy.sample_images(prompts, Sampling(), Key(config.run.seed, GRID_STEP), _SHOWN_IMAGES)
    titles = [caption(row.label, [label.name for label in labels]) for row in rows]
    save_picture(folder / "samples.png", image_grid(samples, _SHOWN_IMAGES, titles))
    print(f"  {folder}: reconstructions.png, samples.png, {LABELS_FILE}")


def advice(report: PretrainReport, config: Config) -> list[str]:
    """What the numbers of a base mean, and what to do about them. The bounds are rules of thumb from small runs."""
    lost = report.reconstruction_mse / max(report.pixel_variance, 1e-12)
    guessing = math.log(config.policy.sizes.vocab_size)
    vqvae, var = config.pretrain.vqvae_steps, config.pretrain.var_steps
    lines = [f"reconstruction MSE: {lost:.0%} of the pixels' variance is lost by the VQ-VAE (0 %: none, 100 %: all but "
             "the mean colour)" + (f"; blurred above 10 %: raise pretrain.vqvae_steps={vqvae}, as to {4 * vqvae}"
                                   if lost > _BLURRED else "")]  # fmt: skip
    lines.append("codes in use: the share of the vocabulary that the last images needed" + (
        f"; below {_CODES_USED:.0%}: raise pretrain.vqvae_steps, or take fewer codes than policy.var.vocab_size="
        f"{config.policy.sizes.vocab_size}" if report.codebook_usage < _CODES_USED else ""))  # fmt: skip
    lines.append(f"nats a token: guessing costs {guessing:.2f}; samples take shape as this falls" + (
        f". It is near guessing: raise pretrain.var_steps={var}, as to {4 * var}"
        if report.token_loss > _NEAR_GUESSING * guessing else ""))  # fmt: skip
    return lines


def pretrain(config: Config, device: torch.device) -> tuple[VAR, VQVAE, PretrainReport]:
    """Train VQ-VAE and transformer from scratch, a function of the config and its seed (on one machine).

    Raises: InputError if the images' labels or sizes do not fit the models; NotFinitePolicy, an InputError, if one of
        them diverges: it must not come into the cache.
    """
    start = time.perf_counter()
    size, num_classes = config.policy.vqvae.image_size, config.policy.sizes.num_classes
    images = load_images(config.pretrain.dataset, size, num_classes)
    if isinstance(images, FolderImages):
        print(f"{images.folder}: {len(images)} images\n{label_table(labels_of(images))}")
        print("".join(f"note: {note}\n" for note in images.notes), end="")
    if len(images) < config.pretrain.batch_size:  # type: ignore[arg-type]
        raise InputError(
            f"{config.pretrain.dataset} has {len(images)} images, fewer than "  # type: ignore[arg-type]
            f"pretrain.batch_size={config.pretrain.batch_size}"
        )
    torch.manual_seed(config.run.seed)
    vqvae, mse, variance, usage = _train_vqvae(config, images, device)
    _refuse_diverged(vqvae, "VQ-VAE", f"pretrain.vqvae_lr (now {config.pretrain.vqvae_lr:g})")
    var, token_loss = _train_var(config, images, vqvae, device)
    _refuse_diverged(var, "transformer", f"pretrain.var_lr (now {config.pretrain.var_lr:g})")
    return var, vqvae, PretrainReport(mse, variance, usage, token_loss, time.perf_counter() - start)


def _refuse_diverged(model: torch.nn.Module, what: str, key: str) -> None:
    wrong = [name for name, p in model.named_parameters() if not bool(p.isfinite().all())]
    if wrong:
        raise NotFinitePolicy(
            f"pre-training of the {what} diverged: {len(wrong)} of its weights hold NaN or infinite numbers, first "
            f"{wrong[0]}; nothing was kept. Set a lower {key}"
        )


def _batches(dataset: Images, config: Config, steps: int, device: torch.device) -> Iterator[tuple[Tensor, ...]]:
    """`steps` shuffled batches, over as many passes as that takes; the last tensor of each are the labels."""
    loader = DataLoader(
        _Answers(dataset),
        collate_fn=_collated,
        batch_size=config.pretrain.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=config.pretrain.num_workers,
        generator=torch.Generator().manual_seed(config.run.seed),
    )
    done = 0
    while True:
        for batch in loader:
            if done == steps:
                return
            if isinstance(batch, InputError):
                raise batch
            largest = int(batch[-1].max())
            if largest >= config.policy.sizes.num_classes:
                raise InputError(
                    f"{config.pretrain.dataset} has label {largest}, but policy.var.num_classes="
                    f"{config.policy.sizes.num_classes}; raise it"
                )
            yield tuple(tensor.to(device) for tensor in batch)
            done += 1


class _Answers(Dataset[Any]):
    """A data set whose errors are items: a worker of DataLoader would put its traceback into the message."""

    def __init__(self, dataset: Images) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Any:
        try:
            return self._dataset[index]
        except InputError as error:
            return error


def _collated(items: list[Any]) -> Any:
    error = next((item for item in items if isinstance(item, InputError)), None)
    return default_collate(items) if error is None else error


def _pixels(images: Tensor) -> Tensor:
    """Images in [0, 1] as the VQ-VAE takes them: in [-1, 1]."""
    return images.mul(2.0).sub(1.0)


def _learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over the first twentieth, then a cosine to a hundredth of the peak."""
    return scheduled(peak, step, steps, max(1, steps // 20), "cosine", floor=0.01)


def _optimizer_step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), _GRAD_CLIP, foreach=True)
    optimizer.step()


def _train_vqvae(config: Config, images: Images, device: torch.device) -> tuple[VQVAE, float, float, float]:
    settings, steps = config.pretrain, config.pretrain.vqvae_steps
    vqvae = VQVAE(config.policy.vqvae).to(device)
    torch.nn.init.normal_(vqvae.quantize.embedding.weight, std=0.5)
    optimizer = torch.optim.AdamW(vqvae.parameters(), betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    hits_V = torch.zeros(config.policy.vqvae.vocab_size, device=device)
    errors: list[Tensor] = []
    usage, variance = 0.0, 0.0
    progress, note = Progress("vq-vae", steps, every=_LINE_EVERY), ""
    for step, (images_B3HW, _) in enumerate(_batches(images, config, steps, device)):
        batch = _pixels(images_B3HW)
        reconstruction, vq_loss, tokens_BL = vqvae(batch)
        error = F.mse_loss(reconstruction, batch)
        _optimizer_step(vqvae, optimizer, error + vq_loss, _learning_rate(step, steps, settings.vqvae_lr))
        hits_V += torch.bincount(tokens_BL.flatten(), minlength=len(hits_V))
        errors.append(error.detach())
        if (step + 1) % _REVIVE_EVERY == 0:
            usage, variance = float((hits_V > 0).float().mean()), _variance(batch)
            note = f"mse={float(errors[-1]):.4f} codes={usage:.0%}"
            if step < steps * 3 // 4:
                _revive(vqvae, optimizer, hits_V, batch)
            hits_V.zero_()
        progress.update(note)
    progress.close()
    mse = float(torch.stack(errors[-_REVIVE_EVERY:]).mean())
    if steps < _REVIVE_EVERY:
        usage, variance = float((hits_V > 0).float().mean()), _variance(batch)
    return vqvae.requires_grad_(False), mse, variance, usage


def _variance(images: Tensor) -> float:
    """Mean square of (B, 3, H, W) pixels around the mean colour of the batch."""
    return float((images - images.mean(dim=(0, 2, 3), keepdim=True)).square().mean())


@torch.no_grad()
def _revive(vqvae: VQVAE, optimizer: torch.optim.Optimizer, hits_V: Tensor, batch: Tensor) -> None:
    """Move codes that nothing used onto what some scale of some image left unexplained."""
    dead = (hits_V == 0).nonzero().flatten()
    quantizer = vqvae.quantize
    rest = vqvae.latents(batch)
    candidates = []
    for scale, tokens_Bl in enumerate(quantizer.split(quantizer.encode(rest))):
        candidates.append(quantizer.next_input(rest, scale).flatten(0, 1))
        rest = rest - quantizer.contribution(tokens_Bl, scale)
    rows = torch.cat(candidates)
    chosen = torch.randint(len(rows), (len(dead),), device="cpu").to(rows.device)
    quantizer.embedding.weight[dead] = rows[chosen]
    for moment in optimizer.state[quantizer.embedding.weight].values():
        if moment.ndim == 2:
            moment[dead] = 0.0


def _train_var(config: Config, images: Images, vqvae: VQVAE, device: torch.device) -> tuple[VAR, float]:
    settings, steps, sizes = config.pretrain, config.pretrain.var_steps, config.policy.sizes
    var = VAR(sizes).to(device).init_weights(config.run.seed)
    matrices = [p for n, p in var.named_parameters() if p.ndim >= 2 and not _undecayed(n)]
    others = [p for n, p in var.named_parameters() if p.ndim < 2 or _undecayed(n)]
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
    losses: list[Tensor] = []
    dataset: Images = images
    if isinstance(images, TensorDataset):  # the same images in every pass: their tokens too
        parts = [_tokens(vqvae, part.to(device)) for part in images.tensors[0].split(settings.batch_size)]
        dataset = TensorDataset(*(torch.cat(pieces).cpu() for pieces in zip(*parts, strict=True)), images.tensors[1])
    progress, note = Progress("var", steps, every=_LINE_EVERY), ""
    for step, (*given, labels_B) in enumerate(_batches(dataset, config, steps, device)):
        tokens_BL, var_input_BLC = given if len(given) == 2 else _tokens(vqvae, given[0])
        dropped_B = torch.rand(len(labels_B), device=device) < settings.class_dropout
        labels_B = torch.where(dropped_B, sizes.num_classes, labels_B)
        logits_BLV = var(labels_B, var_input_BLC, drop_path=settings.drop_path)
        loss = F.cross_entropy(logits_BLV.flatten(0, 1), tokens_BL.flatten())
        _optimizer_step(var, optimizer, loss, _learning_rate(step, steps, settings.var_lr))
        losses.append(loss.detach())
        if (step + 1) % _REVIVE_EVERY == 0:
            note = f"loss={float(losses[-1]):.3f}"
        progress.update(note)
    progress.close()
    return var, float(torch.stack(losses[-_REVIVE_EVERY:]).mean())


@torch.no_grad()
def _tokens(vqvae: VQVAE, images: Tensor) -> tuple[Tensor, Tensor]:
    """Of images in [0, 1]: tokens (B, L), and the transformer's input (B, L - first, C)."""
    tokens_BL = vqvae.encode(_pixels(images))
    return tokens_BL, vqvae.var_input(tokens_BL)


def _undecayed(name: str) -> bool:
    return name.endswith("bias") or any(part in name for part in ("emb", "pos_", "ada_gss", "scale_mul"))


def main(arguments: list[str]) -> int:
    """python -m varfast.pretrain config.yaml [a.b=c ...]"""
    config = read_config(arguments)
    with listen():
        var_path, vqvae_path = pretrained(config, pick_device(config.run.device))
    print(f"transformer {var_path}\nVQ-VAE      {vqvae_path}")
    return 0
