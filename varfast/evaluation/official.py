"""What the official evaluators of benchmarks found, read back, with intervals by prompt.

geneval: results.jsonl of evaluation/evaluate_images.py; its score is the mean over tags of the share of correct images.
geneval2: score_lists.json of evaluation.py, one a sample; Soft-TIFA's geometric and arithmetic mean, in percent.
t2i_compbench: vqa_result.json of a category and an evaluator; the mean over images.

Numbers and groups are those of the benchmarks' own scripts (summary_scores.py, evaluation.py, soft_tifa_analysis.py).
The images of a prompt are not independent of one another, so intervals are over prompts: of a ratio of two sums over
prompts by the delta method (equal counts: of the prompts' means), and of a mean over tags by combining the tags'
intervals, as Zou and Donner, "Construction of confidence limits about effect measures", 2008.

Axes: P prompt.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from varfast.evaluation.asked import Asked, groups_of
from varfast.evaluation.benchmarks import first_numbers
from varfast.evaluation.config import BenchmarkName
from varfast.evaluation.metrics import Estimate, difference_interval, mean_interval
from varfast.evaluation.table import Row
from varfast.files import parse_json, reason
from varfast.files import read_bytes as read_file
from varfast.printable import printable
from varfast.types import InputError

_MOST_BYTES = 512 * 2**20  # GenEval's results of 100 000 images with their boxes
# T2I-CompBench's evaluators by the folder that they write into.
_EVALUATORS = {
    "annotation_blip": "blip_vqa",
    "annotation_obj_detection_2d": "unidet_2d",
    "annotation_obj_detection_3d": "unidet_3d",
    "annotation_num": "unidet_numeracy",
    "annotation_clip": "clip_score",
    "annotation_3_in_1": "3_in_1",
    "sharegpt4v": "sharegpt4v",
    "gpt4v": "gpt4v",
}
_T2I_FILES = ("vqa_result.json", "gpt4v_result_*.json")


@dataclass(frozen=True)
class Measured:
    """A number of a benchmark, as sums over prompts: its value is the ratio of the two sums.

    Attributes:
        name: as in geneval2/soft_tifa_gm.
        group: "all", or as groups_of names it.
        sums, counts: of each prompt, by its id.
        parts: the value is the mean of these, and no ratio, where there are any.
    """

    name: str
    group: str
    sums: dict[int, float]
    counts: dict[int, float]
    parts: tuple[Measured, ...] = ()

    def of(self, ids: set[int], group: str) -> Measured:
        """Of some of the prompts."""
        sums = {prompt: value for prompt, value in self.sums.items() if prompt in ids}
        parts = tuple(part for each in self.parts if (part := each.of(ids, each.group)).sums)
        return Measured(self.name, group, sums, {prompt: self.counts[prompt] for prompt in sums}, parts)

    def per_prompt(self) -> np.ndarray:
        """(P,) numbers whose mean is the ratio, and whose spread is that of the ratio by the delta method."""
        sums_P, counts_P = (np.array(list(values.values()), dtype=np.float64) for values in (self.sums, self.counts))
        if (counts_P == counts_P[0]).all():
            return sums_P / counts_P
        ratio = sums_P.sum() / counts_P.sum()
        return ratio + (sums_P - ratio * counts_P) / counts_P.mean()


def estimate(found: Measured) -> Estimate:
    """The value with its interval."""
    return _mean_of([estimate(part) for part in found.parts]) if found.parts else mean_interval(found.per_prompt())


def difference(before: Measured, after: Measured) -> Estimate:
    """after - before, paired by prompt."""
    if after.parts:
        return _mean_of([difference(*pair) for pair in zip(before.parts, after.parts, strict=True)])
    return difference_interval(before.per_prompt(), after.per_prompt())


def _mean_of(estimates: Sequence[Estimate]) -> Estimate:
    """The mean of independent numbers."""
    value = math.fsum(each.value for each in estimates) / len(estimates)
    bounds = [(each.value - each.low, each.high - each.value) for each in estimates
              if each.low is not None and each.high is not None]  # fmt: skip
    if len(bounds) < len(estimates):
        return Estimate(value)
    below, above = (math.hypot(*halves) / len(estimates) for halves in zip(*bounds, strict=True))
    return Estimate(value, value - below, value + above)


def rows_of(reference: Sequence[Measured] | None, checkpoint: Sequence[Measured], cfg: float | None) -> list[Row]:
    """Lines of the table. reference: the same numbers of the model that is compared with, if it was evaluated too."""
    before = {(found.name, found.group): found for found in reference or ()}
    rows = []
    for found in checkpoint:
        old = before.get((found.name, found.group))
        was, change = (None, None) if old is None else (estimate(old), difference(old, found))
        rows.append(Row(found.name, found.group, was, estimate(found), change, cfg=cfg))
    return rows


def read_results(
    benchmark: BenchmarkName, files: Sequence[str], prompts: Sequence[Asked], samples: int, images: str
) -> list[Measured]:
    """The numbers of a benchmark, from the files that its evaluator wrote for one set of images.

    Args:
        files: paths; for t2i_compbench also folders, in which results are looked for.
        prompts: of the evaluation. samples: images a prompt.
        images: name of the set, as checkpoint.
    Raises: InputError if a file cannot be read, or is not of all of these images.
    """
    if benchmark == "geneval":
        return _geneval(files, prompts, samples, images)
    if benchmark == "geneval2":
        return _geneval2(files, prompts, samples)
    return _t2i_compbench(files, prompts, samples)


def _by_group(found: Measured, prompts: Sequence[Asked]) -> list[Measured]:
    return [found, *(found.of(ids, group) for group, ids in groups_of(prompts).items())]


# ---------------------------------------------------------------------------------------------------------------------
# GenEval


def _geneval(files: Sequence[str], prompts: Sequence[Asked], samples: int, images: str) -> list[Measured]:
    texts = {prompt.id: prompt for prompt in prompts}
    correct: dict[tuple[int, int], bool] = {}
    for file in files:
        for number, line in enumerate(_content(file).split("\n")):
            if line.strip():
                where = f"results={file}, line {number + 1}"
                prompt, sample, right = _geneval_row(where, line, images)
                if prompt not in texts or not 0 <= sample < samples:
                    _refuse(where, f"it is of prompt {prompt}, sample {sample}, which is none of this evaluation")
                if (prompt, sample) in correct:
                    _refuse(where, f"prompt {prompt}, sample {sample} is there twice")
                correct[prompt, sample] = right
    _refuse_missing(files, len(correct), len(prompts) * samples)
    sums = {p.id: float(sum(correct[p.id, s] for s in range(samples))) for p in prompts}
    counts = dict.fromkeys(sums, float(samples))
    tags: dict[str, set[int]] = defaultdict(set)
    for p in prompts:
        tags[p.tag].add(p.id)
    of_images = Measured("geneval", "all", sums, counts)
    overall = Measured("geneval", "all", sums, counts, tuple(of_images.of(ids, f"tag:{t}") for t, ids in tags.items()))
    any_right = {prompt: float(value > 0) for prompt, value in sums.items()}
    return [
        *_by_group(overall, prompts),
        Measured("geneval/correct_images", "all", sums, counts),
        Measured("geneval/correct_prompts", "all", any_right, dict.fromkeys(sums, 1.0)),
    ]


def _geneval_row(where: str, line: str, images: str) -> tuple[int, int, bool]:
    """Prompt, sample, and whether the image is correct. images: name of the set that it should be of."""
    try:
        row = parse_json(line)
        *_, of, prompt, folder, file = Path(row["filename"]).parts
        right = row["correct"]
        if folder != "samples" or not isinstance(right, bool):
            raise ValueError("want filename and correct, as evaluate_images.py writes them")
        found = int(prompt), int(Path(file).stem), right
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        _refuse(where, f"it cannot be read: {printable(error)}")
    if of != images and of.partition("_cfg_")[0] in ("checkpoint", "reference"):
        _refuse(where, f"it is of the images {printable(of)}, not of {images}; name them, as results.{of}=FILE")
    return found


# ---------------------------------------------------------------------------------------------------------------------
# GenEval 2


def _geneval2(files: Sequence[str], prompts: Sequence[Asked], samples: int) -> list[Measured]:
    lists = [_score_lists(file, prompts) for file in files]  # by sample
    _refuse_missing(files, len(lists) * len(prompts), samples * len(prompts))
    flat = [score for of_sample in lists for scores in of_sample for score in scores]
    if all(len(scores) == 1 for of_sample in lists for scores in of_sample) and any(
        len(prompt.metadata["skills"]) > 1 for prompt in prompts
    ):
        return _by_group(_of_prompts("geneval2/vqascore", lists, prompts, np.mean), prompts)
    for file, of_sample in zip(files, lists, strict=True):
        for prompt, scores in zip(prompts, of_sample, strict=True):
            if len(scores) != len(prompt.metadata["skills"]):
                _refuse(f"results={file}", f"it has {len(scores)} scores of prompt {prompt.id}, which has "
                        f"{len(prompt.metadata['skills'])} skills")  # fmt: skip
    hard = all(type(score) is int for score in flat)  # TIFA writes 0 and 1, Soft-TIFA probabilities
    atoms = _of_prompts("geneval2/tifa" if hard else "geneval2/soft_tifa_am", lists, prompts, np.mean)
    found = _by_group(atoms, prompts)
    skills = list(dict.fromkeys(skill for prompt in prompts for skill in prompt.metadata["skills"]))
    found += [_of_skill(atoms.name, skill, lists, prompts) for skill in skills]
    if hard:
        return found
    whole = _of_prompts("geneval2/soft_tifa_gm", lists, prompts, _geometric_mean)
    by_atoms: dict[int, set[int]] = defaultdict(set)
    for prompt in prompts:
        by_atoms[prompt.metadata["atom_count"]].add(prompt.id)
    return [
        *_by_group(whole, prompts),
        *(whole.of(ids, f"atoms:{count}") for count, ids in sorted(by_atoms.items())),
        *found,
    ]


def _of_prompts(name: str, lists: Sequence[list[list[float]]], prompts: Sequence[Asked], mean: Any) -> Measured:
    """The mean over samples of the mean of an image's scores, in percent."""
    sums = {p.id: 100.0 * math.fsum(float(mean(of[row])) for of in lists) for row, p in enumerate(prompts)}
    return Measured(name, "all", sums, dict.fromkeys(sums, float(len(lists))))


def _of_skill(name: str, skill: str, lists: Sequence[list[list[float]]], prompts: Sequence[Asked]) -> Measured:
    """Over all questions of a skill: prompts have different numbers of them."""
    sums, counts = {}, {}
    for row, prompt in enumerate(prompts):
        places = [place for place, of in enumerate(prompt.metadata["skills"]) if of == skill]
        if places:
            sums[prompt.id] = 100.0 * math.fsum(scores[row][place] for scores in lists for place in places)
            counts[prompt.id] = float(len(places) * len(lists))
    return Measured(name, f"skill:{skill}", sums, counts)


def _geometric_mean(scores: Sequence[float]) -> float:
    return 0.0 if min(scores) <= 0 else math.exp(math.fsum(map(math.log, scores)) / len(scores))


def _score_lists(file: str, prompts: Sequence[Asked]) -> list[list[float]]:
    content = _json(file)
    if not isinstance(content, list) or len(content) != len(prompts):
        got = f"{len(content)} lists" if isinstance(content, list) else "no list"
        _refuse(f"results={file}", f"it holds {got}; want one for each of the {len(prompts)} prompts")
    for scores in content:
        good = isinstance(scores, list) and scores and all(type(s) in (int, float) and 0 <= s <= 1.001 for s in scores)
        if not good:
            _refuse(f"results={file}", "want lists of numbers from 0 to 1, as evaluation.py writes them")
    return content


# ---------------------------------------------------------------------------------------------------------------------
# T2I-CompBench


def _t2i_compbench(files: Sequence[str], prompts: Sequence[Asked], samples: int) -> list[Measured]:
    categories: dict[str, list[Asked]] = defaultdict(list)
    for prompt in prompts:
        categories[prompt.tag].append(prompt)
    first = first_numbers(prompts, samples)
    found: dict[tuple[str, str], Measured] = {}
    for path in [path for file in files for path in _t2i_files(file)]:
        where, parts = f"results={path}", path.parts[:-1]
        evaluator = next((_EVALUATORS[part] for part in reversed(parts) if part in _EVALUATORS), None)
        named = [part for part in reversed(parts) if part in categories] or (
            list(categories) if len(categories) == 1 else []
        )
        if evaluator is None or not named:
            what = f"one of the folders {', '.join(_EVALUATORS)}" if evaluator is None else "the folder of a category"
            _refuse(where, f"it does not lie in {what}")
        if (evaluator, named[0]) in found:
            _refuse(where, f"there are two results of {evaluator} of {printable(named[0])}")
        of = categories[named[0]]
        answers = _t2i_answers(where, path, len(of) * samples)
        sums = {p.id: math.fsum(answers[first[p.id] + sample] for sample in range(samples)) for p in of}
        found[evaluator, named[0]] = Measured(
            f"t2i_compbench/{evaluator}", f"tag:{named[0]}", sums, dict.fromkeys(sums, float(samples))
        )
    return list(found.values())


def _t2i_files(file: str) -> list[Path]:
    path = Path(file).expanduser()
    if not path.is_dir():
        return [path]
    # annotation1_blip/VQA/result and so on are steps of BLIP-VQA, whose product is annotation_blip/vqa_result.json.
    found = [p for pattern in _T2I_FILES for p in sorted(path.rglob(pattern)) if p.parent.name in _EVALUATORS]
    if not found:
        _refuse(f"results={file}", f"there is no {' nor '.join(_T2I_FILES)} below {', '.join(_EVALUATORS)}")
    return found


def _t2i_answers(where: str, path: Path, count: int) -> dict[int, float]:
    try:
        rows = [(int(row["question_id"]), float(row["answer"])) for row in _json(str(path))]
    except (ValueError, TypeError, KeyError) as error:
        if isinstance(error, InputError):
            raise
        _refuse(where, f"want a list of question_id and answer: {printable(error)}")
    answers = dict(rows)
    if len(answers) != len(rows) or set(answers) != set(range(count)) or not all(map(math.isfinite, answers.values())):
        _refuse(
            where, f"it has {len(rows)} answers, of {len(answers)} images; want a finite one for each of the {count}"
        )
    return answers


# ---------------------------------------------------------------------------------------------------------------------
# Files


def _content(file: str) -> str:
    try:
        return read_file(Path(file).expanduser(), _MOST_BYTES).decode()
    except OSError as error:
        _refuse(f"results={file}", f"it cannot be read: {reason(error)}")
    except UnicodeDecodeError as error:
        _refuse(f"results={file}", f"byte {error.start} is not of a text in UTF-8")


def _json(file: str) -> Any:
    try:
        return parse_json(_content(file))
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        _refuse(f"results={file}", f"it is not JSON: {printable(error)}")


def _refuse_missing(files: Sequence[str], found: int, wanted: int) -> None:
    if found != wanted:
        where = files[0] if len(files) == 1 else f"{len(files)} files"
        _refuse(f"results={where}", f"of {found} images, where {wanted} were exported; show the evaluator all of them")


def _refuse(where: str, reason: str) -> NoReturn:
    raise InputError(f"{printable(where, 1000)}: {reason}")
