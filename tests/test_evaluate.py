import json
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import varfast.files
from varfast import InputError, Policy, load_policy
from varfast.data.datasets import DigitsClassifier, digits
from varfast.data.labels import Label, label_pool, labels_json
from varfast.distributed import Launch
from varfast.evaluate import main
from varfast.evaluation.arguments import BASE, resolved, samplings
from varfast.evaluation.config import EvaluateConfig
from varfast.evaluation.features import load_real_images
from varfast.evaluation.folder import EvaluationFolder
from varfast.evaluation.measure import evaluate
from varfast.evaluation.metrics import diversity, fid, inception_score, mean_interval, neighbours, statistics
from varfast.evaluation.plan import Plan
from varfast.evaluation.sampling import resized, rounded
from varfast.evaluation.table import about, table, tabulate
from varfast.features.networks import DigitsPixels, to_levels
from varfast.policies.llamagen.policy import LlamaGenPolicy
from varfast.policies.taming.policy import TamingPolicy
from varfast.randomness import EVAL_STEP, Key
from varfast.rewards.brightness import brightness
from varfast.runs.pictures import HEADING_PX
from varfast.settings.loading import parse_arguments
from varfast.train import train
from varfast.types import Sampling

LUMA = {"luma": {"type": "brightness", "mode": "raw"}}


@pytest.fixture
def models(make_models, tmp_path):
    """Weights of a base model, of one that was moved a little, and of their VQ-VAE; ten labels."""
    var, vqvae = make_models(num_classes=10, patch_nums=(1, 8))
    torch.save(vqvae.state_dict(), tmp_path / "vqvae.pth")
    torch.save(var.state_dict(), tmp_path / "base.pth")
    torch.manual_seed(0)
    moved = {n: t + 0.3 * torch.randn_like(t) if n.startswith("head") else t for n, t in var.state_dict().items()}
    torch.save(moved, tmp_path / "tuned.pth")
    return {"checkpoint": f"{tmp_path}/tuned.pth", "reference": f"{tmp_path}/base.pth",
            "vqvae": f"{tmp_path}/vqvae.pth"}  # fmt: skip


@pytest.fixture
def make(models, tmp_path):
    def config(**overrides):
        defaults = {"out": str(tmp_path / "out"), "samples_per_label": 2, "device": "cpu", "scores": LUMA}
        return EvaluateConfig(**(models | defaults | overrides))

    return config


def small_chunks(monkeypatch, images=6):
    monkeypatch.setattr("varfast.evaluation.plan._CHUNK_IMAGES", images)


def levels_of(folder, side="checkpoint"):
    """Saved images by label and number."""
    pictures = {}
    for path in (Path(folder) / "images" / side).iterdir():
        label, sample = path.stem.split("_")
        pictures[int(label), int(sample)] = np.array(Image.open(path))
    return pictures


def by_name(rows):
    return {(row.name, row.labels): row for row in rows}


def test_images_depend_on_seed_label_and_number_alone(make, tmp_path, monkeypatch):
    all_labels = make(save="png", reference=None, samples_per_label=3)
    evaluate(all_labels)
    pictures = levels_of(tmp_path / "out")
    assert pictures.keys() == {(label, sample) for label in range(10) for sample in range(3)}
    assert len({picture.tobytes() for picture in pictures.values()}) == 30
    small_chunks(monkeypatch, 4)
    few = {"labels": [7, 2, 3], "samples_per_label": 2, "micro_batch": 1, "out": str(tmp_path / "few")}
    evaluate(make(save="png", reference=None, **few))
    some = levels_of(tmp_path / "few")
    assert some.keys() == {(label, sample) for label in (2, 3, 7) for sample in range(2)}
    for key, picture in some.items():
        assert np.abs(picture.astype(int) - pictures[key]).max() <= 1  # rounding in products of another size
    evaluate(make(save="png", reference=None, seed=1, out=str(tmp_path / "seed")))
    assert not np.array_equal(levels_of(tmp_path / "seed")[7, 0], pictures[7, 0])


def test_sampling_settings_reach_the_sampler(make, models, tmp_path):
    settings = {"temperature": 0.6, "cfg": 3.0, "top_k": 2, "top_p": 0.8}
    evaluate(make(save="npz", reference=None, samples_per_label=1, seed=5, **settings))
    policy = load_policy(models["checkpoint"], models["vqvae"])
    _, images = policy.sample_images(list(range(10)), Sampling(**settings), Key(5, EVAL_STEP))
    with np.load(tmp_path / "out" / "images_checkpoint.npz") as arrays:
        want = to_levels(images).permute(0, 2, 3, 1).numpy()
        assert np.abs(arrays["arr_0"].astype(int) - want).max() <= 1


def test_accuracy_counts_the_label_first_and_among_the_first_five(make, monkeypatch):
    monkeypatch.setattr(DigitsClassifier, "ranks", lambda self, images, labels: labels)
    rows = by_name(evaluate(make(classifier="digits", reference=None)))
    assert (rows["top1", "all"].checkpoint.value, rows["top5", "all"].checkpoint.value) == (0.1, 0.5)


def test_both_models_draw_with_the_same_random_numbers(make, models, tmp_path):
    evaluate(make(save="png", reference=models["checkpoint"]))
    pictures = [levels_of(tmp_path / "out", side) for side in ("reference", "checkpoint")]
    assert all(np.array_equal(pictures[0][key], pictures[1][key]) for key in pictures[0])
    (row,) = evaluate(make(reference=models["checkpoint"], save="png"))
    assert (row.difference.value, row.difference.low, row.difference.high) == (0.0, 0.0, 0.0)


def test_numbers_are_those_of_the_saved_images(make, tmp_path):
    rows = by_name(evaluate(make(save="npz", samples_per_label=4, classifier="digits", fid_reference="digits")))
    network, classifier = DigitsPixels(), DigitsClassifier()
    sides = {}
    for side in ("reference", "checkpoint"):
        with np.load(tmp_path / "out" / f"images_{side}.npz") as arrays:
            pixels, labels = torch.from_numpy(arrays["arr_0"]), arrays["labels"]
        assert labels.tolist() == list(range(10)) * 4
        assert pixels.dtype == torch.uint8
        images = pixels.permute(0, 3, 1, 2)
        features, logits = network(images)
        luma = brightness(images.float() / 255)
        estimates = {n: row.baseline if side == "reference" else row.checkpoint for (n, _), row in rows.items()}
        found = {name: estimate.value for name, estimate in estimates.items()}
        assert found["score/luma"] == pytest.approx(float(luma.mean()), abs=1e-3)
        assert found["top1"] == pytest.approx(classifier.accuracy(images / 255, torch.from_numpy(labels)), abs=0.1)
        real = load_real_images("digits", network, 8)
        assert found["fid"] == pytest.approx(fid(real.statistics, statistics(features)), rel=1e-6)
        assert found["inception_score"] == pytest.approx(inception_score(logits), rel=1e-6)
        assert found["diversity"] == pytest.approx(diversity(features, labels).mean(), rel=1e-6)
        want = neighbours(real.features_MD, features)
        assert {name: found[name] for name in want} == pytest.approx(want)
        sides[side] = luma.numpy()
    row = rows["score/luma", "all"]
    assert row.difference.value == pytest.approx((sides["checkpoint"] - sides["reference"]).mean(), abs=1e-3)
    for name in ("fid", "inception_score", "precision"):
        found = rows[name, "all"]
        assert found.difference.value == found.checkpoint.value - found.baseline.value
        assert found.difference.low is None


def test_an_image_of_the_page_stands_where_the_file_says(make, tmp_path):
    evaluate(make(save="png", samples_per_label=5))
    shown = json.loads((tmp_path / "out" / "evaluation.json").read_text())["pictures"]
    assert shown["rows"] == [0, 1, 2, 3, 5, 6, 7, 8]
    assert shown["columns"] == [{"of": side, "sample": s} for side in ("reference", "checkpoint") for s in range(4)]
    page = np.array(Image.open(tmp_path / "out" / shown["file"]))
    above, page = page[:HEADING_PX], page[HEADING_PX:]
    pictures = {side: levels_of(tmp_path / "out", side) for side in ("reference", "checkpoint")}
    titles = page.shape[1] - (8 * 52 - 4 + 20)  # pixels of the column in which the labels stand
    assert titles > 0
    for left in (titles, titles + 4 * 52 + 20):  # each model's name stands above it
        assert (above[:, left : left + 4 * 52] < 128).any()
    assert (above[:, :titles] == 255).all()
    for row, label in enumerate(shown["rows"]):
        assert (page[row * 52 : row * 52 + 48, :titles] < 128).any()
        for column, cell in enumerate(shown["columns"]):
            picture = pictures[cell["of"]][label, cell["sample"]]
            enlarge = 48 // len(picture)
            left = titles + column * 52 + 20 * (cell["of"] == "checkpoint")  # a wide gap between the two models
            at = page[row * 52 : row * 52 + 48, left : left + 48]
            np.testing.assert_array_equal(at[::enlarge, ::enlarge], picture)


def test_a_run_folder_is_compared_with_its_base_by_its_rewards(make_config, tmp_path, capsys):
    config = make_config(run__steps=2, update__lr=1e-2)
    train(config)
    base_before = sorted((p.name, p.stat().st_mtime_ns) for p in Path(config.run.dir).iterdir())
    arguments = [f"checkpoint={config.run.dir}", f"out={tmp_path / 'out'}", "samples_per_label=3", "device=cpu"]
    capsys.readouterr()
    assert main(arguments) == 0
    out = capsys.readouterr().out
    for text in ("reference", "checkpoint", "difference", "score/luma", "evaluation.json"):
        assert text in out
    assert sorted((p.name, p.stat().st_mtime_ns) for p in Path(config.run.dir).iterdir()) == base_before
    result = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert (result["reference"], result["images"], result["labels"]) == (BASE, 15, 5)
    (row,) = result["rows"]
    assert row["reference"]["value"] != row["checkpoint"]["value"]
    assert row["difference"]["low"] <= row["difference"]["value"] <= row["difference"]["high"]
    assert main([*arguments[:1], f"out={tmp_path / 'alone'}", "reference=null", "scores={}", "labels=[1]"]) == 0
    alone = json.loads((tmp_path / "alone" / "evaluation.json").read_text())
    assert (alone["reference"], alone["rows"], alone["images"]) == (None, [], 10)


def test_resolved_takes_what_is_left_open_from_the_run(make_config, make_models, models, tmp_path):
    var, vqvae = make_models(patch_nums=(1, 2), vocab_size=16, code_width=4, num_classes=10)
    torch.save(var.state_dict(), tmp_path / "v.pth")
    torch.save(vqvae.state_dict(), tmp_path / "q.pth")
    sizes = {"depth": 1, "patch_nums": [1, 2], "vocab_size": 16, "code_width": 4, "num_classes": 10}
    config = make_config(policy__checkpoint=f"{tmp_path}/v.pth", policy__vqvae_checkpoint=f"{tmp_path}/q.pth",
                         policy__var=sizes, eval__classifier="digits")  # fmt: skip
    train(config)
    noted = (Path(config.run.dir) / "base.json").stat().st_mtime_ns
    found = resolved(EvaluateConfig(checkpoint=config.run.dir))
    assert (found.reference, found.classifier.model, found.family) == (BASE, "digits", "var")
    assert Path(found.vqvae).samefile(tmp_path / "q.pth")
    assert found.scores == config.reward
    kept = resolved(EvaluateConfig(checkpoint=config.run.dir, reference=None, classifier=None, scores={}))
    assert (kept.reference, kept.classifier, kept.scores) == (None, None, {})
    # another model's weights with the run's VQ-VAE; the run itself, spelled out, is its own reference
    rows = evaluate(EvaluateConfig(checkpoint=config.run.dir, reference=f"{tmp_path}/v.pth", device="cpu",
                                   samples_per_label=2, out=str(tmp_path / "a")))  # fmt: skip
    same = evaluate(EvaluateConfig(checkpoint=config.run.dir, device="cpu", samples_per_label=2,
                                   out=str(tmp_path / "b")))  # fmt: skip
    assert rows == same
    assert [row.name for row in rows] == ["score/luma", "top1", "top5"]
    assert (Path(config.run.dir) / "base.json").stat().st_mtime_ns == noted  # several processes read it
    assert found.out == Path(config.run.dir) / "evaluation"
    plain = resolved(EvaluateConfig(**models))
    assert (plain.reference, plain.vqvae) == (models["reference"], models["vqvae"])
    assert (plain.out, plain.scores, plain.classifier) == (Path("evaluation"), {}, None)


def test_labels_are_sampled_by_name(make, tmp_path):
    names = [Label(label, f"class {label}", f"class {label}", 1) for label in range(10)]
    (tmp_path / "labels.json").write_text(labels_json(names))
    config = make(labels=["Class_7", 2], save="png", reference=None)
    evaluate(config)
    assert {label for label, _ in levels_of(config.out)} == {2, 7}
    with pytest.raises(InputError, match="labels holds 'clas 7', which no label is called; did you mean 'class 7'"):
        evaluate(make(labels=["clas 7"], out=str(tmp_path / "other")))


def test_real_images_are_looked_at_before_models_are_loaded(make, tmp_path, monkeypatch):
    monkeypatch.setattr("varfast.evaluation.measure._load", lambda *_: pytest.fail("a model is loaded"))
    for name in ("a", "b"):
        (tmp_path / "real").mkdir(exist_ok=True)
        (tmp_path / "real" / f"{name}.png").write_bytes(b"x")
    for address, said in (("nowhere", "no such file or folder"), (f"{tmp_path}/real", "2 of its files cannot be used")):
        with pytest.raises(InputError, match=f"fid_reference=.*{said}"):
            evaluate(make(fid_reference=address, features="digits"))


def test_seen_and_unseen_labels_are_told_apart(make_config, tmp_path):
    config = make_config(run__steps=1, rollout__label_share=0.4)
    train(config)
    rows = by_name(evaluate(EvaluateConfig(checkpoint=config.run.dir, out=str(tmp_path / "out"), save="png",
                                           device="cpu", samples_per_label=2)))  # fmt: skip
    assert list(rows) == [("score/luma", "all"), ("score/luma", "seen"), ("score/luma", "unseen")]
    seen = set(label_pool(config.rollout, 5, config.run.seed))
    assert len(seen) == 2
    pictures = levels_of(tmp_path / "out")
    for name, labels in (("seen", seen), ("unseen", set(range(5)) - seen)):
        images = torch.stack([torch.from_numpy(p) for (label, _), p in pictures.items() if label in labels])
        luma = float(brightness(images.permute(0, 3, 1, 2) / 255.0).mean())
        assert rows["score/luma", name].checkpoint.value == pytest.approx(luma, abs=1e-3)
    assert "score/luma, unseen labels" in table(list(rows.values()))


@pytest.fixture
def drawn(monkeypatch):
    """How many images were sampled."""
    counts = []

    def sample_images(self, labels, *args, original=Policy.sample_images, **kwargs):
        counts.append(len(labels))
        return original(self, labels, *args, **kwargs)

    monkeypatch.setattr(Policy, "sample_images", sample_images)
    return counts


def test_a_stopped_evaluation_goes_on_and_ends_with_the_same_table(make, drawn, tmp_path, monkeypatch):
    small_chunks(monkeypatch)
    whole = evaluate(make())
    assert sum(drawn) == 40
    saved = []

    def stop_at_the_third(path, write, original=varfast.files.write_atomically):
        if len(saved) == 2:
            raise KeyboardInterrupt
        saved.append(path)
        original(path, write)

    stopped = make(out=str(tmp_path / "stopped"))
    with monkeypatch.context() as patch:
        patch.setattr("varfast.evaluation.folder.write_atomically", stop_at_the_third)
        with pytest.raises(KeyboardInterrupt):
            evaluate(stopped)
    drawn.clear()
    assert evaluate(stopped) == whole
    assert sum(drawn) == 40 - 2 * 6
    drawn.clear()
    assert evaluate(stopped) == whole
    assert drawn == []


def test_processes_share_out_the_chunks(make, drawn, tmp_path, monkeypatch):
    small_chunks(monkeypatch)
    whole = evaluate(make(classifier="digits"))
    shared = make(classifier="digits", out=str(tmp_path / "shared"))
    drawn.clear()
    assert evaluate(shared, Launch(1, 2)) == []
    assert sum(drawn) == 2 * (6 + 2)  # chunks 1 and 3 of 6, 6, 6 and 2 images, of both models
    assert evaluate(shared, Launch(0, 2)) == whole
    assert sum(drawn) == 40
    drawn.clear()
    assert evaluate(shared) == whole  # one process makes the table of what two have sampled
    assert drawn == []


def test_missing_chunks_of_other_processes_are_named(make, monkeypatch, capsys):
    small_chunks(monkeypatch)
    monkeypatch.setattr("varfast.evaluation.folder._PATIENCE_S", 0.0)
    with pytest.raises(InputError, match=r"4 chunks of other processes are missing, reference_00001.npz first"):
        evaluate(make(), Launch(0, 2))
    assert "waiting for 4 chunks" in capsys.readouterr().out


def test_torchrun_is_understood(models, tmp_path, monkeypatch, capsys):
    small_chunks(monkeypatch)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    arguments = [f"{k}={v}" for k, v in models.items()] + [
        f"out={tmp_path / 'out'}",
        "samples_per_label=1",
        "device=cpu",
    ]
    assert main(arguments) == 0
    assert capsys.readouterr().out == ""
    chunks = sorted(p.name for p in (tmp_path / "out" / "chunks").iterdir())
    assert chunks == ["checkpoint_00001.npz", "reference_00001.npz"]


def test_a_folder_of_another_evaluation_is_refused_and_the_difference_shown(make, models, tmp_path):
    evaluate(make())
    with pytest.raises(InputError, match=r"(?s)other settings:\n  seed: 0 there, 1 here\n  choose another folder"):
        evaluate(make(seed=1))
    with pytest.raises(InputError, match=r"scores: .*mode.*raw"):
        evaluate(make(scores={}))
    evaluate(make(micro_batch=3))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("")
    with pytest.raises(InputError, match="holds other files and no evaluation"):
        evaluate(make(out=str(tmp_path / "other")))
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"out=.*file cannot be used"):
        evaluate(make(out=str(tmp_path / "file")))
    torch.save(torch.load(models["reference"]), models["checkpoint"])  # the same name, other weights
    with pytest.raises(InputError, match=r"checkpoint_00000.npz holds images of other weights than checkpoint has now"):
        evaluate(make())


def test_another_fid_reference_samples_nothing_again(make, drawn, tmp_path):
    first = by_name(evaluate(make(fid_reference="digits")))
    real = to_levels(digits(8)[0][:50])
    np.savez(tmp_path / "real.npz", arr_0=real.permute(0, 2, 3, 1).numpy())
    drawn.clear()
    second = by_name(evaluate(make(fid_reference=str(tmp_path / "real.npz"), features="digits")))
    assert drawn == []
    assert first["fid", "all"] != second["fid", "all"]
    assert first["diversity", "all"] == second["diversity", "all"]


def test_what_cannot_be_used_is_refused_before_anything_is_sampled(make, make_models, models, drawn, tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(b"broken")
    (tmp_path / "images" / "b.png").write_bytes(b"broken")
    np.savez(tmp_path / "stats.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    broken = {"fid_reference": str(tmp_path / "images"), "features": "digits"}
    wide = {"fid_reference": str(tmp_path / "stats.npz"), "features": "digits"}
    cases = [
        ({"labels": [3, 10]}, "labels holds 10; the model has labels 0..9"),
        ({"labels": []}, "labels is empty"),
        ({"checkpoint": "nowhere.pth"}, "nowhere.pth does not exist"),
        ({"reference": "nowhere.pth"}, "nowhere.pth does not exist"),
        ({"reference": BASE}, "is not a run folder; name the base's weights"),
        ({"vqvae": None}, r"reference=.*base.pth is not a run folder, so vqvae=... is needed too"),
        ({"checkpoint": str(tmp_path / "images")}, "is no run folder: config.yaml"),
        ({"classifier": "resnet5"}, "classifier.model=resnet5: want digits, or a classifier of torchvision"),
        ({"classifier": {"model": "resnet18", "weights": "IMAGENET1K_V1"}}, "1000 classes apart, .* has 10 labels"),
        ({"scores": {"c": {"type": "classifier", "file": "nowhere.pth"}}}, "scores.c: resnet50 IMAGENET1K_V2 tells"),
        (broken, r"(a|b).png is broken or no image"),
        (wide, "are statistics of other features; these are 64 wide"),
        ({"fid_reference": str(tmp_path / "none"), "features": "digits"}, "no such file or folder"),
        ({"fid_reference": "digits", "labels": [1, 2]}, "4 samples against 1797 real images"),
    ]
    for overrides, message in cases:
        with pytest.raises(InputError, match=message):
            evaluate(make(**overrides))
    assert drawn == []
    assert not (tmp_path / "out").exists()
    five = make_models(num_classes=5, patch_nums=(1, 8))[0]
    torch.save(five.state_dict(), tmp_path / "five.pth")
    with pytest.raises(InputError, match=r"cannot be compared: {'labels': 10, .* {'labels': 5"):
        evaluate(make(checkpoint=str(tmp_path / "five.pth")))
    with pytest.raises(InputError, match="classifier=digits tells 10 classes apart, the policy has 5 labels"):
        evaluate(
            make(checkpoint=str(tmp_path / "five.pth"), reference=None, classifier="digits", out=str(tmp_path / "5"))
        )


def test_missing_classifier_weights_are_named(make_models, models, tmp_path):
    var, _ = make_models(num_classes=1000, patch_nums=(1, 8))
    torch.save(var.state_dict(), tmp_path / "many.pth")
    classifier = ["classifier.model=resnet18", "classifier.weights=IMAGENET1K_V1", "classifier.file=nowhere.pth"]
    arguments = [f"checkpoint={tmp_path}/many.pth", f"vqvae={models['vqvae']}", "device=cpu", *classifier]
    with pytest.raises(InputError, match=r"classifier.file: checkpoint nowhere.pth does not exist"):
        main(arguments)


def test_damaged_chunks_are_named(make, tmp_path):
    evaluate(make())
    path = EvaluationFolder(tmp_path / "out").chunk("checkpoint", 0)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match=r"checkpoint_00000.npz cannot be read .*; delete it and run"):
        evaluate(make())
    path.unlink()
    evaluate(make())


def test_plan_splits_into_runs_of_consecutive_indices():
    plan = Plan([1, 2, 4], 3, 5)
    (chunk,) = plan.chunks
    assert chunk == [1, 2, 4, 6, 7, 9, 11, 12, 14]
    assert [(plan.label(i), plan.sample(i)) for i in chunk[2:5]] == [(4, 0), (1, 1), (2, 1)]
    assert list(plan.ranges(chunk, 8)) == [[1, 2], [4], [6, 7], [9], [11, 12], [14]]
    whole = Plan([0, 1, 2], 3, 3)
    assert list(whole.ranges(whole.chunks[0], 4)) == [[0, 1, 2, 3], [4, 5, 6, 7], [8]]


def test_tabulate_pairs_and_leaves_out_what_is_not_there():
    rng = np.random.RandomState(0)
    labels = np.repeat([0, 1], 4)
    before, after = rng.rand(8), rng.rand(8)
    rows = tabulate({"score/a": before}, {"score/a": after}, labels, {"seen": {0, 1}, "unseen": set()}, {})
    assert [row.labels for row in rows] == ["all", "seen"]  # no unseen label was sampled
    assert rows[0].checkpoint == mean_interval(after)
    (alone,) = tabulate(None, {"score/a": after}, labels, {}, {})
    assert (alone.baseline, alone.difference) == (None, None)
    assert table([alone]).splitlines()[0].split() == ["checkpoint"]
    text = table(rows)
    assert text.splitlines()[0].split() == ["reference", "checkpoint", "difference"]
    assert f"{after.mean():.4g} [" in text
    assert f"{(after - before).mean():+.4g} [" in text


def test_arguments_and_their_defaults():
    config = parse_arguments(
        ["checkpoint=a", "scores.aes.type=aesthetic", "classifier=resnet50", "fid_reference=x.npz"], EvaluateConfig
    )
    assert (config.cfg, config.top_k, config.top_p, config.temperature) == (None, None, None, None)  # the family's
    assert (config.samples_per_label, config.labels) == (10, "all")
    assert (config.classifier.model, config.classifier.weights) == ("resnet50", "IMAGENET1K_V2")
    assert config.feature_networks == ("inception",)
    assert config.scores["aes"].head.startswith("https://")
    with pytest.raises(InputError, match=r"scores.aes.haed: unknown key; did you mean scores.aes.head"):
        parse_arguments(["checkpoint=a", "scores.aes.type=aesthetic", "scores.aes.haed=x"], EvaluateConfig)
    with pytest.raises(InputError, match=r"classifier.modle: unknown key; did you mean classifier.model"):
        parse_arguments(["checkpoint=a", "classifier.modle=x"], EvaluateConfig)
    assert parse_arguments(["checkpoint=a", "fid_reference=digits"], EvaluateConfig).feature_networks == ("digits",)
    assert parse_arguments(["checkpoint=a"], EvaluateConfig).feature_networks == ()


def test_saved_archive_is_read_back_as_a_reference(make, tmp_path):
    evaluate(make(save="npz", reference=None, features="digits"))
    path = tmp_path / "out" / "images_checkpoint.npz"
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
    rows = by_name(evaluate(make(save="npz", reference=None, features="digits", fid_reference=str(path))))
    assert rows["fid", "all"].checkpoint.value == pytest.approx(0, abs=1e-9)
    assert rows["coverage", "all"].checkpoint.value == 1.0


# ---------------------------------------------------------------------------------------------------------------------
# Several guidances, several features


class Means:
    """A second network for the features: mean and spread of each channel; it does not classify."""

    name, width = "inception", 6

    def __call__(self, levels):
        values = levels.double().flatten(2)
        return torch.cat([values.mean(dim=2), values.std(dim=2)], dim=1).cpu().numpy(), None


@pytest.fixture
def two_networks(monkeypatch):
    monkeypatch.setattr("varfast.evaluation.judge._network", lambda config, name, device: {"digits": DigitsPixels,
                        "inception": Means}[name]())  # fmt: skip
    monkeypatch.setattr("varfast.evaluation.judge._CLASSIFYING", ("digits",))


def test_guidances_and_features_stand_in_one_table(make, drawn, two_networks, tmp_path, capsys):
    np.savez(tmp_path / "real.npz", arr_0=to_levels(digits(8)[0][:60]).permute(0, 2, 3, 1).numpy())
    both = {"features": ["digits", "inception"], "fid_reference": str(tmp_path / "real.npz")}
    rows = evaluate(make(cfg=[0, 3.0], save="npz", **both))
    assert sum(drawn) == 2 * 2 * 20
    assert [(row.name, row.features, row.cfg) for row in rows[:4]] == [
        ("score/luma", None, 0.0), ("score/luma", None, 3.0), ("diversity", "digits", 0.0), ("diversity", "digits", 3.0)
    ]  # fmt: skip
    assert {row.features for row in rows if row.name == "fid"} == {"digits", "inception"}
    assert {row.features for row in rows if row.name == "inception_score"} == {"digits"}
    for cfg, network in ((0.0, "inception"), (3.0, "digits")):
        alone = evaluate(make(**both | {"features": network}, cfg=cfg, out=str(tmp_path / network)))
        assert alone == [row for row in rows if row.cfg == cfg and row.features in (None, network)]
    first, last = (next(row for row in rows if row.name == "fid" and row.cfg == cfg) for cfg in (0.0, 3.0))
    assert first.checkpoint.value != last.checkpoint.value
    lines = table(rows).splitlines()
    assert lines[0].split() == ["cfg", "reference", "checkpoint", "difference"]
    assert lines[1].split()[:2] == ["score/luma", "0"]
    assert sum(line.startswith("fid, inception features ") for line in lines) == 2
    drawn.clear()
    assert evaluate(make(cfg=[0, 3.0], save="npz", **both)) == rows
    assert drawn == []
    result = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert result["real_images"] == {"digits": 60, "inception": 60}
    assert result["settings"]["cfg"] == [0.0, 3.0]
    assert list(dict.fromkeys(column["of"] for column in result["pictures"]["columns"])) == [
        "reference_cfg_0", "checkpoint_cfg_0", "reference_cfg_3", "checkpoint_cfg_3"
    ]  # fmt: skip
    text = about(result)
    assert "20 images a model and guidance" in text
    assert "Features: digits, inception." in text
    assert "60 real images" in text
    assert "Fewer images than features (64 of digits): their covariance is singular" in text
    for name in ("reference_cfg_0", "checkpoint_cfg_0", "reference_cfg_3", "checkpoint_cfg_3"):
        assert np.load(tmp_path / "out" / f"images_{name}.npz")["arr_0"].shape == (20, 8, 8, 3)


def test_each_network_is_compared_with_its_own_statistics(make, two_networks, tmp_path):
    sets = {"digits": 64, "inception": 6}
    for name, width in sets.items():
        np.savez(tmp_path / f"{name}.npz", mu=np.zeros(width), sigma=np.eye(width))
    given = {name: str(tmp_path / f"{name}.npz") for name in sets}
    rows = evaluate(make(fid_reference=given, save="npz", reference=None))
    levels = torch.from_numpy(np.load(tmp_path / "out" / "images_checkpoint.npz")["arr_0"]).permute(0, 3, 1, 2)
    for name, network in (("digits", DigitsPixels()), ("inception", Means())):
        (row,) = [row for row in rows if row.name == "fid" and row.features == name]
        known = load_real_images(given[name], network, 8).statistics
        assert row.checkpoint.value == pytest.approx(fid(known, statistics(network(levels)[0])))
    with pytest.raises(InputError, match="are statistics of other features"):
        evaluate(make(fid_reference=given["digits"], features=["digits", "inception"], out=str(tmp_path / "b")))


def test_the_guided_set_comes_first_so_that_a_model_without_guidance_is_refused_at_once(make, monkeypatch):
    def sample_images(self, labels, how, *args, original=Policy.sample_images, **kwargs):
        if how.cfg:
            raise InputError("it knows no guidance")
        return original(self, labels, how, *args, **kwargs)

    monkeypatch.setattr(Policy, "sample_images", sample_images)
    config = make(cfg=[0, 1.5])
    with pytest.raises(InputError, match="it knows no guidance"):
        evaluate(config)
    assert not (Path(config.out) / "chunks").exists()


def test_a_folder_of_the_version_before_goes_on(make, tmp_path):
    evaluate(make(reference=None, features="digits"))
    settings = json.loads((tmp_path / "out" / "settings_0.json").read_text())
    assert settings.keys() == {
        "checkpoint", "reference", "vqvae", "labels", "samples_per_label", "temperature", "cfg", "top_k", "top_p",
        "seed", "dtype", "save", "scores", "classifier", "features",
    }  # fmt: skip
    assert (settings["cfg"], settings["top_k"], settings["top_p"], settings["temperature"]) == (1.5, 900, 0.96, 1.0)
    assert settings["features"] == "digits"
    with zipfile.ZipFile(tmp_path / "out" / "chunks" / "checkpoint_00000.npz") as archive:
        names = {"features.npy", "logits.npy", "score/luma.npy", "levels.npy", "weights.npy"}
        assert set(archive.namelist()) == names


def test_sampling_is_the_familys_own_unless_it_is_given(make_policy):
    config = EvaluateConfig(checkpoint="a")
    assert samplings(config, make_policy()) == [Sampling(1.0, 1.5, 900, 0.96)]
    given = EvaluateConfig(checkpoint="a", cfg=[0, 2], top_k=0, top_p=0.5, temperature=0.7)
    assert samplings(given, make_policy()) == [Sampling(0.7, cfg, 0, 0.5) for cfg in (0.0, 2.0)]
    own = LlamaGenPolicy.published_sampling.fget
    for width, cfg in ((768, 2.0), (1024, 2.0), (1280, 1.75), (1536, 1.75), (3200, 1.65)):
        sized = SimpleNamespace(transformer=SimpleNamespace(config=SimpleNamespace(width=width)))
        assert own(sized) == Sampling(1.0, cfg)
    assert TamingPolicy.published_sampling.fget(None) == Sampling(1.0, 0.0, 600, 0.92)


def test_pixels_are_rounded_as_the_familys_own_code_does(make, tmp_path):
    # LlamaGen: clamp(127.5 x + 128, 0, 255), taming: clip(255 (x + 1) / 2, 0, 255), of x in [-1, 1]; both cut off
    x = torch.rand(1, 3, 50, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2.4 - 1.2
    images = ((x + 1) / 2).clamp(0, 1)
    assert torch.equal(rounded(images, LlamaGenPolicy.rounding), (127.5 * x + 128).clamp(0, 255).to(torch.uint8))
    assert torch.equal(rounded(images, TamingPolicy.rounding), (255 * (x + 1) / 2).clamp(0, 255).to(torch.uint8))
    evaluate(make(save="npz", reference=None))
    evaluate(make(save="npz", reference=None, rounding="truncate", out=str(tmp_path / "cut")))
    near, cut = (np.load(tmp_path / name / "images_checkpoint.npz")["arr_0"].astype(int) for name in ("out", "cut"))
    assert 0.3 < (near - cut).mean() < 0.7
    assert set(np.unique(near - cut)) == {0, 1}


def test_images_are_resized_before_they_are_measured(make, tmp_path):
    images = torch.rand(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    want = torch.nn.functional.interpolate(images, size=(8, 8), mode="bicubic").clamp(0, 1)
    torch.testing.assert_close(resized(images, 8), want)
    assert resized(images, 12) is images
    rows = by_name(evaluate(make(save="npz", image_size=16, reference=None, fid_reference="digits")))
    with np.load(tmp_path / "out" / "images_checkpoint.npz") as arrays:
        assert arrays["arr_0"].shape == (20, 16, 16, 3)
        features = DigitsPixels()(torch.from_numpy(arrays["arr_0"]).permute(0, 3, 1, 2))[0]
    real = load_real_images("digits", DigitsPixels(), 16)
    assert rows["fid", "all"].checkpoint.value == pytest.approx(fid(real.statistics, statistics(features)))


def test_saved_archive_is_read_as_adms_evaluator_reads_it(make, tmp_path):
    evaluate(make(save="npz", reference=None, samples_per_label=3))
    path = tmp_path / "out" / "images_checkpoint.npz"
    whole = np.load(path)["arr_0"]
    assert (whole.dtype, whole.shape) == (np.uint8, (30, 8, 8, 3))
    # A member arr_0.npy of version 1 or 2, in C order, whose bytes are read batch by batch.
    with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
        assert np.lib.format.read_magic(file) == (1, 0)
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
        assert (shape, fortran, dtype) == ((30, 8, 8, 3), False, np.dtype(np.uint8))
        batches = [np.frombuffer(file.read(7 * 192), np.uint8).reshape(-1, 8, 8, 3) for _ in range(5)]
    assert [len(batch) for batch in batches] == [7, 7, 7, 7, 2]
    np.testing.assert_array_equal(np.concatenate(batches), whole)
    assert np.load(path)["labels"].tolist() == list(range(10)) * 3  # as many of each


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cfg=[0, 1.5, 0]"], "cfg: got .*, which names one of them twice"),
        (["cfg=[]"], "cfg: got .*, want a number in 0..1000, or several, such as"),
        (["cfg=-1"], "cfg: got -1, want a number in 0..1000"),
        (["cfg=much"], "cfg: got 'much', want a number in 0..1000"),
        (["features=[inception, vgg]"], "features: got .*, want inception, inception_torchvision, clip"),
        (["features=digits,digits"], "features: got .*, which names one of them twice"),
        (["features=digits", "fid_reference={inception: a.npz}"], "fid_reference names inception, features digits"),
    ],
)
def test_guidances_and_features_that_cannot_be_meant_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        parse_arguments(["checkpoint=a", *arguments], EvaluateConfig)


def test_guidances_and_features_are_lists_with_and_without_brackets():
    for arguments in (["cfg=0,1.5", "features=inception,digits"], ["cfg=[0, 1.5]", "features=[inception, digits]"]):
        config = parse_arguments(["checkpoint=a", *arguments], EvaluateConfig)
        assert (config.cfg, config.feature_networks) == ((0.0, 1.5), ("inception", "digits"))
    one = parse_arguments(["checkpoint=a", "cfg=2", "fid_reference={digits: digits}"], EvaluateConfig)
    assert (one.cfg, one.feature_networks, one.fid_references) == ((2.0,), ("digits",), {"digits": "digits"})
