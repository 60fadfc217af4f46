import json
import zipfile
from pathlib import Path

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
from varfast.evaluation.arguments import BASE, resolved
from varfast.evaluation.config import EvaluateConfig
from varfast.evaluation.features import load_real_images
from varfast.evaluation.folder import EvaluationFolder
from varfast.evaluation.measure import evaluate
from varfast.evaluation.metrics import diversity, fid, inception_score, mean_interval, neighbours, statistics
from varfast.evaluation.plan import Plan
from varfast.evaluation.table import table, tabulate
from varfast.features.networks import DigitsPixels, to_levels
from varfast.randomness import EVAL_STEP, Key
from varfast.rewards.brightness import brightness
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
    pictures = {side: levels_of(tmp_path / "out", side) for side in ("reference", "checkpoint")}
    titles = page.shape[1] - (8 * 52 - 4 + 20)  # pixels of the column in which the labels stand
    assert titles > 0
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
    assert (found.reference, found.classifier.model) == (BASE, "digits")
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
    assert found.out == f"{config.run.dir}/evaluation"
    plain = EvaluateConfig(**models)
    assert resolved(plain) == plain.model_copy(update={"out": "evaluation"})


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
    rows = tabulate({"score/a": before}, {"score/a": after}, labels, {0, 1}, None)
    assert [row.labels for row in rows] == ["all", "seen"]  # no unseen label was sampled
    assert rows[0].checkpoint == mean_interval(after)
    (alone,) = tabulate(None, {"score/a": after}, labels, None, None)
    assert (alone.baseline, alone.difference) == (None, None)
    assert table([alone]).splitlines()[0].split() == ["checkpoint"]
    text = table(rows)
    assert text.splitlines()[0].split() == ["reference", "checkpoint", "difference"]
    assert f"{after.mean():.4g} [" in text
    assert f"{(after - before).mean():+.4g} [" in text


def test_arguments_and_their_defaults_are_vars_inference():
    config = parse_arguments(
        ["checkpoint=a", "scores.aes.type=aesthetic", "classifier=resnet50", "fid_reference=x.npz"], EvaluateConfig
    )
    assert (config.cfg, config.top_k, config.top_p, config.temperature) == (1.5, 900, 0.96, 1.0)
    assert (config.samples_per_label, config.labels) == (10, "all")
    assert (config.classifier.model, config.classifier.weights) == ("resnet50", "IMAGENET1K_V2")
    assert config.feature_network == "inception"
    assert config.scores["aes"].head.startswith("https://")
    with pytest.raises(InputError, match=r"scores.aes.haed: unknown key; did you mean scores.aes.head"):
        parse_arguments(["checkpoint=a", "scores.aes.type=aesthetic", "scores.aes.haed=x"], EvaluateConfig)
    with pytest.raises(InputError, match=r"classifier.modle: unknown key; did you mean classifier.model"):
        parse_arguments(["checkpoint=a", "classifier.modle=x"], EvaluateConfig)
    assert parse_arguments(["checkpoint=a", "fid_reference=digits"], EvaluateConfig).feature_network == "digits"
    assert parse_arguments(["checkpoint=a"], EvaluateConfig).feature_network is None


def test_saved_archive_is_read_back_as_a_reference(make, tmp_path):
    evaluate(make(save="npz", reference=None, features="digits"))
    path = tmp_path / "out" / "images_checkpoint.npz"
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
    rows = by_name(evaluate(make(save="npz", reference=None, features="digits", fid_reference=str(path))))
    assert rows["fid", "all"].checkpoint.value == pytest.approx(0, abs=1e-9)
    assert rows["coverage", "all"].checkpoint.value == 1.0
