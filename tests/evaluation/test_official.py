"""Folders for the official evaluators of benchmarks, and their results: rows of our own in the benchmarks' shapes."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from varfast import InputError
from varfast.evaluation.asked import Asked, groups_of, read_asked, save_asked
from varfast.evaluation.benchmarks import Export
from varfast.evaluation.metrics import difference_interval, mean_interval
from varfast.evaluation.official import difference, estimate, read_results, rows_of
from varfast.evaluation.plan import Plan

# As evaluation_metadata.jsonl of GenEval.
GENEVAL = [
    Asked(0, "a photo of a kite", "single_object", "train", {"include": [{"class": "kite", "count": 1}]}),
    Asked(1, "a photo of a tram", "single_object", "held_out", {"include": [{"class": "tram", "count": 1}]}),
    Asked(2, "a photo of a pear", "single_object", "train", {"include": [{"class": "pear", "count": 1}]}),
    Asked(3, "a photo of three oaks", "counting", "train", {"include": [{"class": "oak", "count": 3}]}),
    Asked(5, "a photo of two moons", "counting", "held_out", {"include": [{"class": "moon", "count": 2}]}),
]
# As geneval2_data.jsonl of GenEval 2: prompts have different numbers of questions of a skill.
GENEVAL2 = [
    Asked(0, "two red kites", metadata={"atom_count": 3, "vqa_list": [["How many kites are in the image?", "two"],
          ["Are the kites red?", "Yes"], ["Are there any kites in the image?", "Yes"]],
          "skills": ["count", "attribute", "object"]}),
    Asked(1, "a tram and a pear", metadata={"atom_count": 3, "vqa_list": [["Are there any trams in the image?", "Yes"],
          ["Are there any pears in the image?", "Yes"]], "skills": ["object", "object"]}),
    Asked(2, "an old oak", metadata={"atom_count": 4, "vqa_list": [["Is the oak old?", "Yes"]],
          "skills": ["attribute"]}),
]  # fmt: skip
# As examples/dataset/color_val.txt and numeracy_val.txt of T2I-CompBench.
T2I = [
    Asked(0, "a green kite and a blue tram", "color_val"),
    Asked(1, "four oaks", "numeracy_val"),
    Asked(2, "A red pear.", "color_val"),
]


def plan_of(prompts, samples):
    return Plan([prompt.id for prompt in prompts], samples, 7)


def pictures(plan):
    """An image for each index, which tells it."""
    (chunk,) = plan.chunks
    return chunk, np.stack([np.full((4, 4, 3), index, np.uint8) for index in chunk])


def exported(tmp_path, benchmark, prompts, samples=2, name="checkpoint"):
    plan = plan_of(prompts, samples)
    chunk, levels = pictures(plan)
    export = Export(tmp_path, benchmark, prompts, samples)
    export.save(name, levels, plan, chunk)
    return tmp_path / export.finish(name), plan


def index_of(path):
    return int(np.array(Image.open(path))[0, 0, 0])


def test_geneval_folder_is_what_its_evaluator_walks(tmp_path):
    folder, plan = exported(tmp_path, "geneval", GENEVAL)
    seen = {}
    for sub in folder.iterdir():  # as evaluate_images.py does
        assert sub.name.isdigit()
        metadata = json.loads((sub / "metadata.jsonl").read_text())
        for file in (sub / "samples").iterdir():
            seen[metadata["prompt"], file.name] = index_of(file)
            assert metadata["tag"]
            assert metadata["include"][0]["class"] + "s" * (metadata["include"][0]["count"] > 1) in metadata["prompt"]
    assert seen == {(p.text, f"{s:05d}.png"): plan.index(p.id, s) for p in GENEVAL for s in range(2)}
    assert (folder / "00005" / "samples" / "00001.png").exists()


def test_geneval2_files_are_what_its_evaluator_reads(tmp_path):
    folder, plan = exported(tmp_path, "geneval2", GENEVAL2)
    rows = [json.loads(line) for line in (tmp_path / "geneval2" / "geneval2_data.jsonl").read_text().splitlines()]
    assert [set(row) for row in rows] == [{"prompt", "atom_count", "vqa_list", "skills"}] * 3
    for sample in range(2):
        images = json.loads((folder / f"images_{sample:05d}.json").read_text())
        assert {text: index_of(path) for text, path in images.items()} == {
            prompt.text: plan.index(prompt.id, sample) for prompt in GENEVAL2
        }
        assert all(Path(path).is_absolute() for path in images.values())
        assert [row["prompt"] for row in rows] == list(images)


def test_t2i_compbench_names_and_numbers_are_those_its_evaluators_parse(tmp_path):
    folder, plan = exported(tmp_path, "t2i_compbench", T2I, samples=3)
    for category in ("color_val", "numeracy_val"):
        names = sorted((p.name for p in (folder / category / "samples").iterdir()),
                       key=lambda x: int(x.split("_")[-1].split(".")[0]))  # fmt: skip
        prompts = [prompt for prompt in T2I if prompt.tag == category]
        assert [name.split("_")[0] for name in names] == [p.text for p in prompts for _ in range(3)]
        assert [int(name.split("_")[-1].split(".")[0]) for name in names] == list(range(3 * len(prompts)))
        found = [index_of(folder / category / "samples" / name) for name in names]
        assert found == [plan.index(prompt.id, sample) for prompt in prompts for sample in range(3)]


@pytest.mark.parametrize(
    ("name", "prompt", "message"),
    [
        ("geneval", Asked(4, "a kite", "counting"), r"prompt 4 \('a kite'\) has no include; .*evaluation_metadata"),
        ("geneval2", Asked(4, "a kite"), "has no atom_count; .*geneval2_data.jsonl"),
        ("t2i_compbench", Asked(4, "a kite"), "has no tag; .*color_val.txt"),
        ("t2i_compbench", Asked(4, "../kite", "a"), "'../kite' cannot be the name of a file"),
        ("t2i_compbench", Asked(4, "kite", ".."), r"'\.\.' cannot be the name of a file"),
        ("t2i_compbench", Asked(4, "a_kite", "a"), "holds _, where the evaluators take a prompt to end"),
        ("t2i_compbench", Asked(4, "kite " * 60, "a"), "is too long for the name of a file"),
    ],
)
def test_export_refuses_prompts_that_the_evaluator_cannot_read(tmp_path, name, prompt, message):
    with pytest.raises(InputError, match=message):
        Export(tmp_path, name, [prompt], 1)


def test_export_refuses_what_would_overwrite_or_follow_links(tmp_path):
    with pytest.raises(InputError, match="'two red kites' is there more than once"):
        Export(tmp_path, "geneval2", [GENEVAL2[0], Asked(9, "two red kites", metadata=GENEVAL2[0].metadata)], 1)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "geneval" / "checkpoint").mkdir(parents=True)
    (tmp_path / "geneval" / "checkpoint" / "00000").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="00000: it is a link"):
        exported(tmp_path, "geneval", GENEVAL)
    assert not list((tmp_path / "elsewhere").iterdir())


def test_prompts_of_an_evaluation_are_read_back(tmp_path):
    save_asked(tmp_path, [*GENEVAL, *GENEVAL2, Asked(9, "ein Drache\u2028", "\x85")])
    assert read_asked(tmp_path)[:8] == [*GENEVAL, *GENEVAL2]
    assert list(groups_of(GENEVAL)) == ["train", "held_out", "tag:single_object", "tag:counting"]
    assert groups_of(GENEVAL)["tag:counting"] == {3, 5}
    assert groups_of(GENEVAL2) == {}
    (tmp_path / "prompts.jsonl").write_text('{"id": 0}\n')
    with pytest.raises(InputError, match="prompts.jsonl is damaged"):
        read_asked(tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# Results


def values_of(found):
    return {(each.name, each.group): estimate(each).value for each in found}


def geneval_lines(correct, name="checkpoint"):
    """results.jsonl as evaluate_images.py writes it. correct: {prompt: [of each sample]}."""
    rows = []
    for prompt in GENEVAL:
        for sample, right in enumerate(correct[prompt.id]):
            file = f"/somewhere/geneval/{name}/{prompt.id:05d}/samples/{sample:05d}.png"
            rows.append({"filename": file, "tag": prompt.tag, "prompt": prompt.text, "correct": right, "reason": "",
                         "metadata": json.dumps(prompt.row), "details": "{}"})  # fmt: skip
    return rows[::-1]  # in the order of os.listdir, which is none


CORRECT = {0: [True, True], 1: [True, False], 2: [True, False], 3: [False, False], 5: [True, False]}


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_geneval_results_are_those_of_its_summary(tmp_path):
    rows = geneval_lines(CORRECT)
    found = read_results("geneval", [write_lines(tmp_path / "r.jsonl", rows)], GENEVAL, 2, "checkpoint")
    # summary_scores.py: means of `correct` by tag, and the mean of those; `any` over images of the same metadata.
    by_tag, by_metadata = {}, {}
    for row in rows:
        by_tag.setdefault(row["tag"], []).append(row["correct"])
        by_metadata.setdefault(row["metadata"], []).append(row["correct"])
    means = {tag: sum(of) / len(of) for tag, of in by_tag.items()}
    values = values_of(found)
    assert values["geneval", "all"] == pytest.approx(sum(means.values()) / len(means))
    assert values["geneval", "all"] == pytest.approx((4 / 6 + 1 / 4) / 2)
    assert {tag: values["geneval", f"tag:{tag}"] for tag in means} == pytest.approx(means)
    assert values["geneval/correct_images", "all"] == sum(row["correct"] for row in rows) / len(rows) == 0.5
    assert values["geneval/correct_prompts", "all"] == sum(map(any, by_metadata.values())) / 5 == 0.8
    assert values["geneval", "train"] == pytest.approx((3 / 4 + 0 / 2) / 2)
    assert values["geneval", "held_out"] == pytest.approx((1 / 2 + 1 / 2) / 2)


def test_intervals_are_over_prompts(tmp_path):
    found = read_results(
        "geneval", [write_lines(tmp_path / "r.jsonl", geneval_lines(CORRECT))], GENEVAL, 2, "checkpoint"
    )
    by_name = {(each.name, each.group): estimate(each) for each in found}
    single, counting = mean_interval(np.array([1.0, 0.5, 0.5])), mean_interval(np.array([0.0, 0.5]))
    assert by_name["geneval", "tag:single_object"] == single
    assert by_name["geneval", "tag:counting"] == counting
    overall = by_name["geneval", "all"]
    assert overall.value - overall.low == pytest.approx(
        math.sqrt((single.value - single.low) ** 2 + (counting.value - counting.low) ** 2) / 2
    )
    # Wilson's, where each prompt is right or wrong as a whole
    share = by_name["geneval/correct_prompts", "all"]
    assert share == mean_interval(np.array([1, 1, 1, 0, 1]))
    assert share.high < 1


def test_interval_of_an_overall_score_covers_what_it_says():
    """Simulated: two tags with different shares, images of a prompt that resemble each other."""
    from varfast.evaluation.official import Measured

    rng, hits = np.random.RandomState(0), 0
    for _ in range(400):
        sums = {}
        for tag, share in ((0, 0.8), (1, 0.3)):
            of_prompt = rng.beta(share * 2, (1 - share) * 2, 60)  # the share of right images of each prompt
            sums |= {100 * tag + i: float(rng.binomial(4, p)) for i, p in enumerate(of_prompt)}
        whole = Measured("x", "all", sums, dict.fromkeys(sums, 4.0))
        parts = tuple(whole.of({i for i in sums if i // 100 == tag}, "tag") for tag in (0, 1))
        found = estimate(Measured("x", "all", sums, whole.counts, parts))
        hits += found.low <= 0.55 <= found.high
    assert 0.925 <= hits / 400 <= 0.975


def test_two_models_are_compared_prompt_by_prompt(tmp_path):
    better = CORRECT | {3: [True, True]}
    before, after = (
        read_results("geneval", [write_lines(tmp_path / f"{name}.jsonl", geneval_lines(of, name))], GENEVAL, 2, name)
        for name, of in (("reference", CORRECT), ("checkpoint", better))
    )
    rows = {(row.name, row.labels): row for row in rows_of(before, after, None)}
    row = rows["geneval", "tag:counting"]
    assert (row.baseline.value, row.checkpoint.value, row.difference.value) == (0.25, 0.75, 0.5)
    assert row.difference == difference_interval(np.array([0.0, 0.5]), np.array([1.0, 0.5]))
    overall = rows["geneval", "all"]
    assert overall.difference.value == pytest.approx(0.25)
    assert overall.difference == difference(before[0], after[0])
    assert overall.difference.low < 0.25 < overall.difference.high


SCORES = [
    [[0.9, 0.4, 0.8], [0.5, 0.7], [0.2]],
    [[0.1, 0.6, 1.0], [0.9, 0.3], [0.0]],
]


def test_geneval2_results_are_those_of_its_analysis(tmp_path):
    files = []
    for sample, lists in enumerate(SCORES):
        (tmp_path / f"{sample}.json").write_text(json.dumps(lists))
        files.append(str(tmp_path / f"{sample}.json"))
    values = values_of(read_results("geneval2", files, GENEVAL2, 2, "checkpoint"))
    means = [sum(scores) / len(scores) for lists in SCORES for scores in lists]
    geometric = [np.prod(scores) ** (1 / len(scores)) for lists in SCORES for scores in lists]
    assert values["geneval2/soft_tifa_am", "all"] == pytest.approx(100 * np.mean(means))
    assert values["geneval2/soft_tifa_gm", "all"] == pytest.approx(100 * np.mean(geometric))
    # per_skill_analysis: over all questions of a skill
    assert values["geneval2/soft_tifa_am", "skill:object"] == pytest.approx(
        100 * np.mean([0.8, 0.5, 0.7, 1.0, 0.9, 0.3])
    )
    assert values["geneval2/soft_tifa_am", "skill:attribute"] == pytest.approx(100 * np.mean([0.4, 0.2, 0.6, 0.0]))
    # per_atomicity_analysis: prompts of as many atoms
    assert values["geneval2/soft_tifa_gm", "atoms:3"] == pytest.approx(
        100 * np.mean([geometric[0], geometric[1], geometric[3], geometric[4]])
    )
    assert values["geneval2/soft_tifa_gm", "atoms:4"] == pytest.approx(100 * geometric[2] / 2)


def test_geneval2_knows_which_method_made_the_scores(tmp_path):
    for content, want in (
        ([[1, 0, 1], [1, 1], [0]], {"geneval2/tifa"}),
        ([[0.5], [0.25], [1.0]], {"geneval2/vqascore"}),
    ):
        (tmp_path / "s.json").write_text(json.dumps(content))
        found = read_results("geneval2", [str(tmp_path / "s.json")], GENEVAL2, 1, "checkpoint")
        assert {each.name for each in found} == want
        mean = np.mean([np.mean(scores) for scores in content])
        assert estimate(found[0]).value == pytest.approx(100 * mean)


def test_ratio_of_unequal_counts_has_the_interval_of_a_resampling():
    from varfast.evaluation.official import Measured

    rng = np.random.RandomState(1)
    counts = rng.randint(1, 6, 200).astype(float)
    sums = rng.binomial(counts.astype(int), rng.beta(2, 2, 200)).astype(float)
    found = estimate(Measured("x", "all", dict(enumerate(sums)), dict(enumerate(counts))))
    assert found.value == pytest.approx(sums.sum() / counts.sum())
    rows = rng.randint(0, 200, (4000, 200))
    low, high = np.percentile(sums[rows].sum(1) / counts[rows].sum(1), [2.5, 97.5])
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.005)


def t2i_results(folder, category, evaluator, answers):
    path = folder / category / evaluator
    path.mkdir(parents=True)
    rows = [{"question_id": number, "answer": answer} for number, answer in answers.items()]
    (path / "vqa_result.json").write_text(json.dumps(rows))
    return str(path / "vqa_result.json")


def test_t2i_compbench_results_are_means_by_category_and_evaluator(tmp_path):
    blip = {3: "0.2500", 0: "0.5000", 2: "1.0000", 1: "0.0000"}  # text, as BLIP_vqa.py writes
    t2i_results(tmp_path, "color_val", "annotation_blip", blip)
    t2i_results(tmp_path, "color_val", "annotation1_blip/VQA/result", {0: "0.9"})  # a step of it
    counted = t2i_results(tmp_path, "numeracy_val", "annotation_num", {1: 1.0, 0: 0.0})
    found = read_results("t2i_compbench", [str(tmp_path)], T2I, 2, "checkpoint")
    assert values_of(found) == {
        ("t2i_compbench/blip_vqa", "tag:color_val"): pytest.approx(sum(map(float, blip.values())) / 4),
        ("t2i_compbench/unidet_numeracy", "tag:numeracy_val"): 0.5,
    }
    assert estimate(found[0]) == mean_interval(np.array([0.25, 0.625]))  # of the two prompts' images
    assert [m.name for m in read_results("t2i_compbench", [counted], T2I, 2, "checkpoint")] == [
        "t2i_compbench/unidet_numeracy"
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows[1:], "of 9 images, where 10 were exported; show the evaluator all of them"),
        (lambda rows: [*rows, rows[0]], "line 11: prompt 5, sample 1 is there twice"),
        (lambda rows: [rows[0] | {"filename": "/x/checkpoint/00004/samples/0.png"}], "of prompt 4, sample 0, which is"),
        (lambda rows: [rows[0] | {"filename": "a.png"}], "line 1: it cannot be read"),
        (lambda rows: [rows[0] | {"correct": "yes"}], "line 1: it cannot be read: want filename and correct"),
        (lambda rows: geneval_lines(CORRECT, "reference"), "of the images reference, not of checkpoint; name them"),
        (lambda rows: [[]], "line 1: it cannot be read"),
    ],
)
def test_geneval_results_of_other_images_are_refused(tmp_path, change, message):
    path = write_lines(tmp_path / "r.jsonl", change(geneval_lines(CORRECT)))
    with pytest.raises(InputError, match=message):
        read_results("geneval", [path], GENEVAL, 2, "checkpoint")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("geneval2", "[[0.5]]", "it holds 1 lists; want one for each of the 3 prompts"),
        ("geneval2", "{}", "it holds no list"),
        ("geneval2", "[[0.5, 0.5, 0.5], [0.5], [0.5]]", "1 scores of prompt 1, which has 2 skills"),
        ("geneval2", '[[0.5], ["x"], [0.5]]', "want lists of numbers from 0 to 1"),
        ("geneval2", "[[0.5], [NaN], [0.5]]", "want lists of numbers from 0 to 1"),
        ("geneval2", "[", "it is not JSON"),
        ("t2i_compbench", "[]", "does not lie in one of the folders annotation_blip"),
    ],
)
def test_damaged_results_are_named(tmp_path, name, content, message):
    (tmp_path / "s.json").write_text(content)
    prompts = {"geneval2": GENEVAL2, "t2i_compbench": T2I}[name]
    with pytest.raises(InputError, match=rf"results=.*s.json: (it has |it )?{message}"):
        read_results(name, [str(tmp_path / "s.json")], prompts, 1, "checkpoint")
    with pytest.raises(InputError, match=r"none.json.*cannot be read|does not lie"):
        read_results(name, ["none.json"], prompts, 1, "checkpoint")


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ({0: 1.0}, "1 answers, of 1 images; want a finite one for each of the 4"),
        ({0: 1.0, 1: 1.0, 2: 1.0, 7: 1.0}, "4 answers, of 4 images"),
        ({0: 1.0, 1: 1.0, 2: 1.0, 3: "x"}, "want a list of question_id and answer"),
    ],
)
def test_t2i_compbench_results_of_other_images_are_refused(tmp_path, answers, message):
    t2i_results(tmp_path, "color_val", "annotation_clip", answers)
    with pytest.raises(InputError, match=message):
        read_results("t2i_compbench", [str(tmp_path)], T2I, 2, "checkpoint")
