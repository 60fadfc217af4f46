"""evaluate and sample of a model that is conditioned on text: a stand-in whose images tell what they were asked for."""

import json
import shlex
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from varfast import InputError
from varfast.data.prompts import Prompt, PromptSet, drawn, save_prompts
from varfast.distributed import Launch
from varfast.evaluate import main as evaluate_main
from varfast.evaluation.asked import read_asked
from varfast.evaluation.config import EvaluateConfig
from varfast.evaluation.measure import evaluate
from varfast.evaluation.metrics import difference_interval, mean_interval
from varfast.evaluation.table import about, table
from varfast.runs.manifest import dump_config
from varfast.runs.pictures import HEADING_PX, image_grid, prompt_title
from varfast.sample import main as sample_main
from varfast.types import Rollout, Sampling

LUMA = {"luma": {"type": "brightness", "mode": "raw"}}
TEXTS = ["a red cube", "two dogs", "nine bright stars over a hill in a very dark and cold night", "a car"]


class Painter:
    """A policy of texts: an image is grey, by its text, the seed and the number of the sample."""

    cuda_graph, strict, tokens_shape, image_size = False, False, (4,), 16
    published_sampling, rounding, device = Sampling(), "nearest", torch.device("cpu")

    def __init__(self, light=0.0):
        self.light, self.num_classes, self.drawn = light, 0, 0
        self.parts = {"model": torch.nn.Linear(1, 1)}
        torch.nn.init.constant_(self.parts["model"].weight, light)
        torch.nn.init.zeros_(self.parts["model"].bias)

    def set_prompts(self, texts):
        self.texts, self.num_classes = list(texts), len(texts)

    def sample_images(self, prompts, how, key, micro_batch=None, keep_input=False):
        ids = prompts.ids_B.tolist()
        self.drawn += len(ids)
        grey = [grey_of(self.texts[id], key.seed, key.first_sample + row, self.light) for row, id in enumerate(ids)]
        images = torch.tensor(grey).view(-1, 1, 1, 1).expand(-1, 3, 16, 16).clone()
        zeros = torch.zeros(len(ids), 4)
        return Rollout(prompts, zeros.long(), zeros, zeros, how.temperature, True), images


def grey_of(text, seed, number, light=0.0):
    return (zlib.crc32(f"{text} {seed} {number}".encode()) % 1000) / 2000 + light


@pytest.fixture
def models(monkeypatch, tmp_path):
    """Painters by the address that evaluate and sample load; files stand for them."""
    found = {"checkpoint": Painter(0.25), "reference": Painter()}
    for name in found:
        (tmp_path / f"{name}.pth").write_bytes(b"")

    def load(address, *_, **__):
        return found["reference" if "reference" in address else "checkpoint"]

    for room in ("varfast.evaluation.measure", "varfast.sample"):
        monkeypatch.setattr(f"{room}.load_policy", load)
    monkeypatch.setattr("varfast.evaluation.measure.load_base", lambda *_: found["reference"])
    return found


@pytest.fixture
def make(models, tmp_path):
    def config(**overrides):
        defaults = {"checkpoint": f"{tmp_path}/checkpoint.pth", "reference": f"{tmp_path}/reference.pth",
                    "out": f"{tmp_path}/out", "prompts": TEXTS, "samples_per_prompt": 3, "scores": LUMA,
                    "device": "cpu"}  # fmt: skip
        return EvaluateConfig(**(defaults | overrides))

    return config


def greys(light=0.0, samples=3, texts=TEXTS, seed=0):
    """(prompt, sample) of the images that an evaluation samples."""
    return np.array(
        [[grey_of(text, seed, s * len(texts) + i, light) for s in range(samples)] for i, text in enumerate(texts)]
    )


def by_name(rows):
    return {(row.name, row.labels): row for row in rows}


def result_of(out):
    return json.loads((Path(out) / "evaluation.json").read_text())


def test_scores_of_prompts_have_intervals_over_prompts(make, tmp_path):
    (row,) = evaluate(make())
    before, after = greys().mean(axis=1), greys(0.25).mean(axis=1)
    for found, want in ((row.baseline, mean_interval(before)), (row.checkpoint, mean_interval(after)),
                        (row.difference, difference_interval(before, after))):  # fmt: skip
        assert (found.value, found.low, found.high) == pytest.approx((want.value, want.low, want.high), abs=1e-4)
    result = result_of(tmp_path / "out")
    assert (result["images"], result["prompts"]) == (12, 4)
    assert "12 images a model, of 4 prompts." in about(result)
    assert "normal over prompts" in result["intervals"]
    assert result["pictures"]["titles"] == TEXTS
    assert [prompt.text for prompt in read_asked(tmp_path / "out")] == TEXTS
    page = np.array(Image.open(tmp_path / "out" / "pictures.png"))[HEADING_PX:]
    levels = np.rint(greys()[:, 0] * 255)  # left of the gap between the models, after the titles
    titles = page.shape[1] - (2 * 3 * 52 - 4 + 20)
    assert [abs(int(page[52 * i + 10, titles + 10, 0]) - levels[i]) <= 1 for i in range(4)] == [True] * 4


def test_an_evaluation_of_prompts_goes_on_and_refuses_others(make, models, monkeypatch):
    monkeypatch.setattr("varfast.evaluation.plan._CHUNK_IMAGES", 5)
    evaluate(make(), Launch(1, 2))
    assert models["checkpoint"].drawn == 5
    rows = evaluate(make(), Launch(0, 2))
    assert models["checkpoint"].drawn == 12
    assert evaluate(make()) == rows
    assert models["checkpoint"].drawn == 12
    with pytest.raises(InputError, match="(?s)holds an evaluation with other settings.*prompts: .*4, sha256"):
        evaluate(make(prompts=[*TEXTS[:3], "a cat"]))
    with pytest.raises(InputError, match="samples_per_prompt: 3 there, 4 here"):
        evaluate(make(samples_per_prompt=4))


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_files_bring_tags_and_domains(make, tmp_path):
    rows = [{"prompt": "a red cube", "tag": "colour"}, {"prompt": "two dogs", "tag": "counting"},
            {"prompt": "a blue cube", "tag": "colour", "domain": "held_out"}]  # fmt: skip
    (tmp_path / "shape_val.txt").write_text("a round box\n\na square ball\n")
    found = by_name(evaluate(make(prompts=[written(tmp_path / "p.jsonl", rows), f"{tmp_path}/shape_val.txt"])))
    groups = {
        "train": [0, 1, 3, 4],
        "held_out": [2],
        "tag:colour": [0, 2],
        "tag:counting": [1],
        "tag:shape_val": [3, 4],
    }
    assert {group for _, group in found} == {"all", *groups}
    texts = ["a red cube", "two dogs", "a blue cube", "a round box", "a square ball"]
    means = greys(0.25, texts=texts).mean(axis=1)
    for group, ids in groups.items():
        assert found["score/luma", group].checkpoint.value == pytest.approx(means[ids].mean(), abs=1e-4)
    text = table(list(found.values()))
    assert "score/luma, held out prompts" in text
    assert "score/luma, tag counting" in text


@pytest.fixture
def run(make_config, models):
    """A run folder that keeps prompts. (The models are the stand-ins, whatever its config says.)"""
    config = make_config()
    Path(config.run.dir).mkdir()
    (Path(config.run.dir) / "config.yaml").write_text(dump_config(config))
    prompts = [Prompt(text) for text in TEXTS] + [Prompt(f"held {i}", "t", {}, "held_out") for i in range(20)]
    save_prompts(PromptSet((*prompts, Prompt("far", "t", {}, "out_of_domain"))), Path(config.run.dir))
    return config.run.dir


def test_a_run_is_measured_on_its_own_prompts_by_domain(run, tmp_path):
    how = {"checkpoint": run, "device": "cpu", "samples_per_prompt": 2}
    rows = by_name(evaluate(EvaluateConfig(**how, out=str(tmp_path / "a"))))
    assert [group for _, group in rows] == ["all", "train", "held_out", "out_of_domain", "tag:t"]
    texts = [*TEXTS, *(f"held {i}" for i in range(20)), "far"]
    means = greys(0.25, 2, texts).mean(axis=1)
    assert rows["score/luma", "held_out"].checkpoint.value == pytest.approx(means[4:24].mean(), abs=1e-4)
    assert rows["score/luma", "train"].difference.value == pytest.approx(0.25, abs=1e-4)
    evaluate(EvaluateConfig(**how, out=str(tmp_path / "b"), max_prompts=3, seed=7))
    asked = read_asked(tmp_path / "b")
    of_domain = {d: [p.text for p in asked if p.domain == d] for d in ("train", "held_out", "out_of_domain")}
    assert {d: len(of) for d, of in of_domain.items()} == {"train": 3, "held_out": 3, "out_of_domain": 1}
    assert of_domain["held_out"] == [f"held {i}" for i in drawn(range(20), 3, 7)]
    # A file's prompts have the domain that the run knows them by.
    evaluate(EvaluateConfig(**how, out=str(tmp_path / "c"), prompts=["far", "unknown", "a car"]))
    assert [p.domain for p in read_asked(tmp_path / "c")] == ["out_of_domain", "", "train"]


def test_drawn_is_a_fixed_choice_in_order():
    ids = list(range(100, 200))
    few = drawn(ids, 10, 3)
    assert few == sorted(few) == drawn(ids, 10, 3) != drawn(ids, 10, 4)
    assert set(few) < set(drawn(ids, 20, 3))  # more of them are these and others
    assert drawn(ids, 100, 3) == ids


def test_rewards_read_text_tag_and_metadata(make, tmp_path, monkeypatch):
    (tmp_path / "own.py").write_text("def judge(images, prompts, batch):\n"
                                     "    return [len(p) + len(t) + m['n'] for p, t, m in zip(prompts, batch.tags, "
                                     "batch.metadata)]\n")  # fmt: skip
    rows = [{"prompt": "ab", "tag": "x", "n": 10}, {"prompt": "abc", "tag": "yy", "n": 20}]
    mine = {"mine": {"type": "function", "function": f"{tmp_path}/own.py:judge"}}
    found = by_name(evaluate(make(prompts=[written(tmp_path / "p.jsonl", rows)], scores=mine)))
    assert found["score/mine", "tag:x"].checkpoint.value == 13
    assert found["score/mine", "tag:yy"].checkpoint.value == 25


GENEVAL = [
    {"tag": "single", "include": [{"class": "kite", "count": 1}], "prompt": "a photo of a kite"},
    {"tag": "counting", "include": [{"class": "oak", "count": 3}], "prompt": "a photo of three oaks"},
]


def test_geneval_is_exported_and_its_results_come_back(make, models, tmp_path, capsys):
    keys = ["samples_per_prompt=2", "device=cpu", "scores={luma: {type: brightness, mode: raw}}", "export=geneval"]
    named = [f"checkpoint={tmp_path}/checkpoint.pth", f"out={tmp_path}/out"]
    prompts = f"prompts={written(tmp_path / 'evaluation_metadata.jsonl', GENEVAL)}"
    everything = [*named, prompts, f"reference={tmp_path}/reference.pth", *keys]
    assert evaluate_main(everything) == 0
    said = capsys.readouterr().out
    assert (
        f"evaluate_images.py {tmp_path}/out/geneval/checkpoint --outfile {tmp_path}/out/geneval/results_check" in said
    )
    assert f"python -m varfast.evaluate {tmp_path}/checkpoint.pth out={tmp_path}/out" in said
    for name, light in (("reference", 0.0), ("checkpoint", 0.25)):
        lines = []
        for folder in sorted((tmp_path / "out" / "geneval" / name).iterdir()):
            metadata = json.loads((folder / "metadata.jsonl").read_text())
            assert metadata == GENEVAL[int(folder.name)]
            for path in sorted((folder / "samples").iterdir()):
                index = int(path.stem) * 2 + int(folder.name)
                grey = np.array(Image.open(path))[0, 0, 0]
                assert abs(grey - 255 * grey_of(metadata["prompt"], 0, index, light)) <= 1
                lines.append({"filename": str(path), "tag": metadata["tag"], "prompt": metadata["prompt"],
                              "correct": bool(light), "reason": "", "metadata": json.dumps(metadata)})  # fmt: skip
        written(tmp_path / "out" / "geneval" / f"results_{name}.jsonl", lines)
    back = json.dumps({n: f"{tmp_path}/out/geneval/results_{n}.jsonl" for n in ("checkpoint", "reference")})
    models.clear()  # no model is loaded
    assert evaluate_main([*named, f"results={back}"]) == 0
    assert "geneval, tag counting" in capsys.readouterr().out
    rows = {(row["name"], row["labels"]): row for row in result_of(tmp_path / "out")["rows"]}
    assert list(rows)[:3] == [("score/luma", "all"), ("score/luma", "tag:single"), ("score/luma", "tag:counting")]
    overall = rows["geneval", "all"]
    assert [overall[side]["value"] for side in ("reference", "checkpoint", "difference")] == [0.0, 1.0, 1.0]
    with pytest.raises(InputError, match="holds an evaluation with samples_per_prompt=2, not 5"):
        evaluate_main([*named, f"results={back}", "samples_per_prompt=5"])
    with pytest.raises(InputError, match="results.other: .*has no such images; it has reference, checkpoint"):
        evaluate_main([*named, f"results.other={tmp_path}/a.jsonl"])


def exported(tmp_path, capsys, *arguments):
    """Evaluate with export; returns the arguments that it prints for reading results back."""
    named = [f"checkpoint={tmp_path}/checkpoint.pth", f"out={tmp_path}/my out", "device=cpu", "scores={}"]
    assert evaluate_main([*named, *arguments]) == 0
    python, dash_m, command, *back = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert (python, dash_m, command) == ("python", "-m", "varfast.evaluate")
    return back


def test_what_is_printed_reads_the_results_of_geneval2_back(models, tmp_path, capsys):
    row = {
        "atom_count": 2,
        "vqa_list": [["Is it red?", "Yes"], ["Is there a kite?", "Yes"]],
        "skills": ["attribute", "object"],
    }
    prompts = written(tmp_path / "geneval2_data.jsonl", [{"prompt": "a red kite"} | row, {"prompt": "an oak"} | row])
    back = exported(tmp_path, capsys, f"prompts={prompts}", "samples_per_prompt=2", "export=geneval2")
    folder = tmp_path / "my out" / "geneval2" / "checkpoint"
    for sample in range(2):
        assert list(json.loads((folder / f"images_{sample:05d}.json").read_text())) == ["a red kite", "an oak"]
        (folder / f"scores_{sample:05d}.json").write_text(json.dumps([[0.25, 1.0], [0.5, 0.5]]))
    assert evaluate_main(back) == 0
    rows = {(row["name"], row["labels"]): row["checkpoint"] for row in result_of(tmp_path / "my out")["rows"]}
    assert rows["geneval2/soft_tifa_gm", "all"]["value"] == pytest.approx(50.0)
    assert rows["geneval2/soft_tifa_am", "skill:object"]["value"] == pytest.approx(75.0)
    assert "geneval2/soft_tifa_am, skill object" in capsys.readouterr().out


def test_what_is_printed_reads_the_results_of_t2i_compbench_back(models, tmp_path, capsys):
    (tmp_path / "color_val.txt").write_text("a red kite and a blue oak\na green tram\n")
    (tmp_path / "numeracy_val.txt").write_text("two kites\n")
    prompts = f"prompts=[{tmp_path}/color_val.txt, {tmp_path}/numeracy_val.txt]"
    back = exported(tmp_path, capsys, prompts, "samples_per_prompt=2", "export=t2i_compbench")
    for category, answers in (("color_val", [0.25, 0.75, 0.5, 0.5]), ("numeracy_val", [1.0, 0.0])):
        folder = tmp_path / "my out" / "t2i_compbench" / "checkpoint" / category
        names = {int(p.stem.rpartition("_")[2]): p.stem.partition("_")[0] for p in (folder / "samples").iterdir()}
        assert sorted(names) == list(range(len(answers)))
        (folder / "annotation_blip").mkdir()
        content = [{"question_id": n, "answer": f"{a:.4f}"} for n, a in enumerate(answers)]
        (folder / "annotation_blip" / "vqa_result.json").write_text(json.dumps(content))
    assert evaluate_main(back) == 0
    rows = {(row["name"], row["labels"]): row["checkpoint"] for row in result_of(tmp_path / "my out")["rows"]}
    assert {key: row["value"] for key, row in rows.items()} == {
        ("t2i_compbench/blip_vqa", "tag:color_val"): 0.5, ("t2i_compbench/blip_vqa", "tag:numeracy_val"): 0.5
    }  # fmt: skip


def test_results_stay_when_the_table_is_made_again(make, tmp_path):
    prompts = [written(tmp_path / "evaluation_metadata.jsonl", GENEVAL)]
    how = {"prompts": prompts, "samples_per_prompt": 1, "export": "geneval", "reference": None}
    first = evaluate(make(**how))
    lines = [{"filename": f"checkpoint/{i:05d}/samples/00000.png", "correct": i == 0} for i in range(2)]
    file = written(tmp_path / "r.jsonl", lines)
    found = evaluate(make(**how, results=file))
    assert found[: len(first)] == first
    assert by_name(found)["geneval", "all"].checkpoint.value == 0.5
    assert evaluate(make(**how)) == found
    lines[1]["correct"] = True
    written(tmp_path / "r.jsonl", lines)
    again = evaluate(make(**how, results=file))
    assert len(again) == len(found)
    assert by_name(again)["geneval", "all"].checkpoint.value == 1.0
    (tmp_path / "out" / "results.json").write_text('{"rows": [{"name": 3}]}')
    with pytest.raises(InputError, match="results.json is damaged"):
        evaluate(make(**how))


def test_exported_images_that_are_gone_are_named(make, tmp_path):
    how = {"prompts": [written(tmp_path / "m.jsonl", GENEVAL)], "samples_per_prompt": 1, "export": "geneval"}
    evaluate(make(**how))
    (tmp_path / "out" / "geneval" / "reference" / "00001" / "samples" / "00000.png").unlink()
    with pytest.raises(
        InputError, match="1 exported images are gone, .*reference/00001/samples/00000.png first; delete"
    ):
        evaluate(make(**how))


def test_results_of_several_guidances_stand_in_rows_of_their_own(make, models, tmp_path, capsys):
    prompts = f"prompts={written(tmp_path / 'm.jsonl', GENEVAL)}"
    back = exported(tmp_path, capsys, prompts, "samples_per_prompt=1", "export=geneval", "cfg=[0, 2.5]")
    for cfg, right in (("0", [False, True]), ("2.5", [True, True])):
        name = f"checkpoint_cfg_{cfg}"
        lines = [{"filename": f"a/{name}/{i:05d}/samples/00000.png", "correct": c} for i, c in enumerate(right)]
        written(tmp_path / "my out" / "geneval" / f"results_{name}.jsonl", lines)
    assert evaluate_main(back) == 0
    rows = [row for row in result_of(tmp_path / "my out")["rows"] if (row["name"], row["labels"]) == ("geneval", "all")]
    assert [(row["cfg"], row["checkpoint"]["value"]) for row in rows] == [(0.0, 0.5), (2.5, 1.0)]


def test_results_of_an_evaluation_that_exported_nothing_are_refused(make, tmp_path):
    with pytest.raises(InputError, match=r"holds no complete evaluation; first run evaluate with export="):
        evaluate(make(results="r.jsonl"))
    evaluate(make())
    with pytest.raises(InputError, match=r"evaluation.json is of an evaluation without export"):
        evaluate(make(results="r.jsonl"))


def test_arguments_of_the_other_kind_of_model_are_refused(make, make_policy, monkeypatch, tmp_path):
    for key in ({"labels": [1]}, {"samples_per_label": 3}):
        with pytest.raises(
            InputError, match=f"{next(iter(key))}: .*conditioned on texts; leave it out, and use prompts"
        ):
            evaluate(make(**key))
    with pytest.raises(InputError, match="tells labels apart, and .* is a model of texts"):
        evaluate(make(classifier="digits"))
    with pytest.raises(InputError, match="prompts is missing: .*give texts, as prompts="):
        evaluate(make(prompts=None))
    with pytest.raises(InputError, match=r"export=geneval: prompt 0 .*has no tag"):
        evaluate(make(export="geneval"))
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr("varfast.evaluation.measure.load_policy", lambda *_, **__: make_policy())
    with pytest.raises(InputError, match="prompts: .*conditioned on labels; leave it out, and use labels"):
        evaluate(make())


# ---------------------------------------------------------------------------------------------------------------------
# sample


def shown(path, columns):
    """Grey of each cell of a grid of 16-pixel images, and the column of titles."""
    page = np.array(Image.open(path))
    left = page.shape[1] - (columns * 52 - 4)
    rows = (page.shape[0] + 4) // 52
    cells = [[int(page[52 * row + 10, left + 52 * c + 10, 0]) for c in range(columns)] for row in range(rows)]
    return np.array(cells), page[:, :left]


def test_sample_shows_prompts_with_their_texts(models, tmp_path, capsys):
    texts = f"prompts=[{', '.join(TEXTS)}]"
    arguments = [f"checkpoint={tmp_path}/reference.pth", f"out={tmp_path}/s.png", "device=cpu", "samples_per_prompt=3"]
    assert sample_main([*arguments, texts, "seed=4"]) == 0
    cells, titles = shown(tmp_path / "s.png", 3)
    want = np.array([[grey_of(text, 4, 3 * i + s) for s in range(3)] for i, text in enumerate(TEXTS)]) * 255
    assert np.abs(cells - want).max() <= 1
    blank = torch.zeros(12, 3, 16, 16)
    page = image_grid(blank, 3, [prompt_title(text) for text in TEXTS])
    np.testing.assert_array_equal(titles, page[:, : titles.shape[1]])
    assert "4 prompts x 3 samples" in capsys.readouterr().out
    (tmp_path / "p.txt").write_text("\n".join(TEXTS))
    assert sample_main([*arguments, f"prompts={tmp_path}/p.txt", "seed=4", f"out={tmp_path}/t.png"]) == 0
    assert (tmp_path / "t.png").read_bytes() == (tmp_path / "s.png").read_bytes()


def test_sample_of_a_run_shows_prompts_that_it_trains_on(run, tmp_path, capsys):
    arguments = [f"checkpoint={run}", f"out={tmp_path}/s.png", "device=cpu", "samples_per_prompt=1"]
    assert sample_main(arguments) == 0
    cells, _ = shown(tmp_path / "s.png", 1)
    texts = [*TEXTS, *(f"held {i}" for i in range(4))]
    assert np.abs(cells[:, 0] - [255 * grey_of(t, 0, i, 0.25) for i, t in enumerate(texts)]).max() <= 1
    assert "the first 8 of 25 prompts are shown" in capsys.readouterr().out
    with pytest.raises(InputError, match="labels: .*conditioned on texts"):
        sample_main([*arguments, "labels=[1]"])
    with pytest.raises(InputError, match="samples_per_label: .*; leave it out, and use prompts and samples_per_prompt"):
        sample_main([*arguments, "samples_per_label=1"])
