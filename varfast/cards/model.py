"""What the card of a model says, whether or not a run has made it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from varfast.cards.markdown import front_matter, markdown_table
from varfast.data.labels import imagenet
from varfast.policies.config import FamilyConfig

if TYPE_CHECKING:
    from varfast.policies.pretrained import Model

LICENCE = (
    "## Licence\n\nTo be stated by whoever publishes this model. The terms of the base model, of the VQ-VAE and of "
    "models used as a reward may bind it."
)
# A model of the hub has up to 21 843 labels.
_LISTED_LABELS = 1000


def policy_card(model: Model, name: str, files: tuple[str, str], dtype: str, repo_id: str | None = None) -> str:
    """The card of a policy that was saved from Python: what it is, and how it is loaded.

    Args:
        name: of the model.
        files: of the two parts.
        repo_id: the repository that it is uploaded to; None: it is a folder.
    """
    from varfast import __version__
    from varfast.policies.families import family_of

    section = model.section
    kind, sizes, with_public_code = family_of(section).model_card(section, *files)
    rows = {
        "sizes": sizes,
        **({"base model": model.base_model} if model.base_model else {}),
        "numbers of the trained weights": dtype,
        "written by": f"varfast {__version__}",
    }
    labels = [] if model.labels is None else [label_section([[i, name] for i, name in enumerate(model.labels)])]
    return card(
        front_matter(section, name, base_model=model.base_model),
        name,
        f"{kind}, saved by varfast.",
        rows,
        [load_section(repr(repo_id or name), section), with_public_code, *labels, LICENCE],
    )


def card(metadata: str, title: str, what: str, rows: Mapping[str, Any], sections: Sequence[str]) -> str:
    """A card. rows: of the table below the line that says what the model is."""
    table = markdown_table(["", ""], list(rows.items()))
    return "\n\n".join([metadata, f"# {title}", what, table, *sections]) + "\n"


def load_section(arguments: str, section: FamilyConfig) -> str:
    """How varfast loads the model. arguments: of load_policy."""
    prompts = [0, 1] if section.conditioned_on == "labels" else ["a red cat"]
    return (
        "## Load it\n\nWith varfast:\n\n```python\nimport varfast\n\n"
        f"policy = varfast.load_policy({arguments})\n"
        f"rollout = policy.sample({prompts!r}, temperature=1.0, seed=0)\n"
        "images = policy.decode(rollout.tokens_BL)\n```"
    )


def label_section(rows: Sequence[Sequence[Any]], head: Sequence[str] = ("label", "name")) -> str:
    """The labels of a model, as a table; ImageNet's by what they are called, since everybody has them."""
    names = [row[1] for row in rows]
    if names == list(imagenet().values()):
        return imagenet_section()
    left = f"\n\n{len(rows) - _LISTED_LABELS} more are not listed." if len(rows) > _LISTED_LABELS else ""
    return "## Labels\n\n" + markdown_table(head, rows[:_LISTED_LABELS]) + left


def imagenet_section() -> str:
    """Of a model whose labels are taken for ImageNet's."""
    names = list(imagenet().values())
    order = f"in the order of their WordNet ids, 0 {names[0]} to {len(names) - 1} {names[-1]}"
    return f"## Labels\n\nTaken for the {len(names)} classes of ImageNet (ILSVRC 2012), {order}."
