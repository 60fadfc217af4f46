import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from varfast import InputError
from varfast.export import file_card, main
from varfast.files import save_tensors
from varfast.models import VAR
from varfast.policies.var.weights import load_var
from varfast.runs.checkpoint import Checkpoints
from varfast.runs.config import ExportConfig
from varfast.runs.environment import environment
from varfast.runs.folder import RunFolder
from varfast.settings.loading import parse_arguments
from varfast.train import train

NAMES = json.loads((Path(__file__).parent / "data" / "names.json").read_text())


def model_card(name, folder, step):
    """The card of a file that is not written."""
    return file_card(Path(name), ExportConfig(checkpoint="x", out=name), folder, folder.load_config(), step, {})


def save(folder, var, step):
    """A checkpoint of `step` steps, without an optimizer's state."""
    with Checkpoints(folder.checkpoints, folder.load_config(), environment(), print) as checkpoints:
        checkpoints.save(step, var, torch.optim.AdamW(var.parameters()), {"reward": 0.25})


@pytest.fixture
def make_run(make_config, tmp_path):
    """A run folder after 2 of 3 steps, and its weights."""

    def make(**overrides):
        config = make_config(**overrides)
        folder = RunFolder(config.run.dir)
        folder.prepare(config)
        var = VAR(config.policy.sizes).init_weights(1)
        save(folder, var, 2)
        return folder, var.state_dict()

    return make


def read(path):
    return load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) and a[n].dtype == b[n].dtype for n in a)


@pytest.mark.parametrize("name", ["model.safetensors", "model.pth"])
def test_export_round_trip_is_bit_for_bit(make_run, tmp_path, name, capsys):
    folder, state = make_run()
    out = tmp_path / "deep" / name
    assert main([f"checkpoint={folder.path}", f"out={out}"]) == 0
    assert same(read(out), state)
    assert same(load_var(str(out)).state_dict(), state)
    assert {p.name for p in out.parent.iterdir()} == {name, f"model.vqvae{out.suffix}", "model.md"}
    assert f"Model card: {out.with_suffix('.md')}" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["model.safetensors", "model.pth"])
def test_names_shapes_and_dtypes_are_those_of_the_public_code(make_run, golden, request, tmp_path, name):
    tag = request.node.callspec.params["golden"]
    folder, _ = make_run(policy__var=golden.var.config.model_dump(mode="json"))
    main([f"checkpoint={folder.path}", f"out={tmp_path / name}"])
    written = read(tmp_path / name)
    found = {n: [str(t.dtype).removeprefix("torch."), list(t.shape)] for n, t in written.items()}
    assert found == NAMES[tag]
    if name.endswith("pth"):  # safetensors sorts by size
        assert list(found) == list(NAMES[tag])
        assert type(written) is dict


@pytest.mark.parametrize("name", ["model.safetensors", "model.pth"])
def test_bfloat16_is_rounded_once_and_loads_as_float32(make_run, tmp_path, name):
    folder, state = make_run()
    main([f"checkpoint={folder.path}", f"out={tmp_path / name}", "dtype=bfloat16"])
    written = read(tmp_path / name)
    rounded = {n: t.bfloat16() if t.is_floating_point() else t for n, t in state.items()}
    assert same(written, rounded)
    assert same(load_var(str(tmp_path / name)).state_dict(), {n: rounded[n].to(t.dtype) for n, t in state.items()})


def test_files_that_exist_are_kept_unless_overwrite(make_run, tmp_path):
    folder, state = make_run()
    out = tmp_path / "model.pth"
    arguments = [f"checkpoint={folder.path}", f"out={out}"]
    for kept in (out, out.with_suffix(".md")):
        kept.write_text("mine")
        with pytest.raises(InputError, match=rf"{kept.name} exists; choose another out, or overwrite=true"):
            main(arguments)
        assert kept.read_text() == "mine"
        assert len([p for p in tmp_path.iterdir() if p.name.startswith("model")]) == 1
        kept.unlink()
    out.write_text("mine")
    assert main([*arguments, "overwrite=true"]) == 0
    assert same(read(out), state)


def test_weights_alone_are_enough(make_run, tmp_path):
    folder, state = make_run()
    shutil.rmtree(folder.checkpoints)
    with pytest.raises(InputError, match="no checkpoint yet"):
        main([f"checkpoint={folder.path}", f"out={tmp_path / 'a.pth'}"])
    save_tensors(folder.weights(folder.load_config()), state)
    assert main([f"checkpoint={folder.path}", f"out={tmp_path / 'a.pth'}"]) == 0
    assert same(read(tmp_path / "a.pth"), state)


def test_weights_of_other_sizes_are_refused(make_run, tmp_path):
    folder, _ = make_run()
    other = VAR(folder.load_config().policy.sizes.model_copy(update={"num_classes": 7})).init_weights(1)
    save(folder, other, 3)
    with pytest.raises(InputError, match="does not fit the configured model: model.class_emb.weight"):
        main([f"checkpoint={folder.path}", f"out={tmp_path / 'a.pth'}"])
    assert not (tmp_path / "a.pth").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["out=a.pth"], "checkpoint is missing; want a path"),
        (["checkpoint=runs/x", "out=a.bin"], "got a.bin, want a name that ends with .safetensors or .pth"),
        (["checkpoint=runs/x", "out=a.pth", "dtype=float16"], "want float32 or bfloat16"),
        (["checkpoint=nowhere", "out=a.pth"], "nowhere is no run folder"),
    ],
)
def test_export_refuses(arguments, message):
    with pytest.raises(InputError, match=message):
        main(arguments)


def test_a_write_that_fails_leaves_nothing(make_run, tmp_path, monkeypatch):
    from safetensors import SafetensorError

    def fail(tensors, filename, metadata):
        Path(filename).write_bytes(b"half")
        raise SafetensorError("No space left on device")

    folder, _ = make_run()
    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(InputError, match=r"cannot write .*model.safetensors: No space left on device"):
        main([f"checkpoint={folder.path}", f"out={tmp_path / 'model.safetensors'}"])
    assert not [p for p in tmp_path.iterdir() if p.name.startswith("model")]


def card_of(folder, tmp_path, name="model.pth"):
    main([f"checkpoint={folder.path}", f"out={tmp_path / name}", "overwrite=true"])
    return (tmp_path / "model.md").read_text()


def test_card_says_what_the_model_is(make_run, tmp_path):
    reward = {"a|b": {"type": "brightness", "mode": "dark", "weight": 2.0}}
    folder, _ = make_run(reward=reward, grpo__kl_beta=0.15, rollout__cfg=1.5)
    card = card_of(folder, tmp_path)
    for said in ("random weights", "2 of 3, 8 images each (2 labels x 4 samples)", "0.15, 0.2, 0.0001", "mode: dark",
                 "| 0.7, guidance 1.5 as a part of the policy and no filters |", "not complete", "| float32 |",
                 "varfast.load_policy(var='model.pth'"):  # fmt: skip
        assert said in card
    settings = card.partition("## All settings")[2].partition("```yaml\n")[2].partition("```")[0]
    wanted = yaml.safe_load(folder.config.read_text())
    del wanted["run"]["dir"], wanted["pretrain"]["cache_dir"]  # folders of this machine
    assert yaml.safe_load(settings) == wanted
    assert "makes no model of these sizes" in card  # a VQ-VAE of one level


def test_card_has_the_numbers_of_a_complete_run(make_run, tmp_path):
    folder, state = make_run(reward={"a|b": {"type": "brightness", "mode": "raw"}})
    summary = {"before": {"reward/a|b": 0.25}, "after": {"reward/a|b": 0.75, "accuracy": 0.5}}
    (folder.path / "summary.json").write_text(json.dumps(summary))
    assert "0.75" not in card_of(folder, tmp_path)  # 2 of 3 steps: other weights than those that were measured
    var = VAR(folder.load_config().policy.sizes)
    var.load_state_dict(state)
    save(folder, var, 3)
    row = {"name": "fid", "labels": "all", "reference": None, "checkpoint": {"value": 12.345678}, "difference": None}
    (folder.path / "evaluation").mkdir()
    (folder.path / "evaluation" / "evaluation.json").write_text(json.dumps({"rows": [row]}))
    card = card_of(folder, tmp_path)
    assert "| reward/a\\|b | 0.25 | 0.75 |\n| accuracy |  | 0.5 |" in card
    assert "|  | checkpoint |" in card
    assert "| fid, all | 12.35 |" in card


@pytest.mark.parametrize("name", ["model.pth", "model.safetensors"])
def test_card_loads_with_the_public_code_where_that_has_the_sizes(make_config, tmp_path, name):
    """Runs the snippet with a stand-in for build_vae_var, which takes the public one's arguments."""
    sizes = {"depth": 1, "patch_nums": [1, 2], "vocab_size": 16, "code_width": 4, "num_classes": 5}
    config = make_config(policy__var=sizes, policy__vqvae={"base_channels": 32, "num_phi": 1})
    folder = RunFolder(config.run.dir)
    folder.prepare(config)
    var = VAR(config.policy.sizes).init_weights(1)
    state = var.state_dict()
    save(folder, var, 3)
    card = card_of(folder, tmp_path, name)
    snippet = card.partition("With the public code")[2].partition("```python\n")[2].partition("```")[0]
    built = {}

    def build_vae_var(device, patch_nums, V, Cvae, ch, share_quant_resi, num_classes, depth, shared_aln, attn_l2_norm):
        built.update(
            patch_nums=patch_nums, V=V, Cvae=Cvae, ch=ch, phi=share_quant_resi, saln=shared_aln, l2=attn_l2_norm
        )
        return torch.nn.Identity(), VAR(config.policy.sizes)

    snippet = snippet.replace("from models import build_vae_var\n", "").replace(f"'{name}'", f"'{tmp_path / name}'")
    snippet = "\n".join(line for line in snippet.splitlines() if not line.startswith("vae.load"))
    scope = {"build_vae_var": build_vae_var}
    exec(snippet, scope)
    assert built == {"patch_nums": (1, 2), "V": 16, "Cvae": 4, "ch": 32, "phi": 1, "saln": False, "l2": True}
    assert same(scope["var"].state_dict(), state)


def test_export_of_a_real_run_holds_its_weights(make_config, tmp_path):
    config = make_config(run__steps=1)
    train(config)
    out = tmp_path / "model.safetensors"
    main([f"checkpoint={config.run.dir}", f"out={out}"])
    assert "before | after" in out.with_suffix(".md").read_text()
    assert same(read(out), torch.load(RunFolder(config.run.dir).weights(config), weights_only=True))


def test_arguments_of_export():
    config = parse_arguments(["checkpoint=a", "out=b.pth"], ExportConfig)
    assert (config.dtype, config.overwrite) == ("float32", False)
    with pytest.raises(InputError, match="overwrit: unknown key; did you mean overwrite"):
        parse_arguments(["checkpoint=a", "out=b.pth", "overwrit=true"], ExportConfig)


def test_the_card_of_a_model_with_imagenets_labels_says_so(make_run):
    var = {"depth": 1, "patch_nums": [1, 2], "vocab_size": 16, "code_width": 4, "num_classes": 1000}
    weights = {"policy__checkpoint": "a.pth", "policy__vqvae_checkpoint": "b.pth"}
    folder, _ = make_run(policy__var=var, **weights)
    card = model_card("m.pth", folder, 2)
    assert "Taken for the 1000 classes of ImageNet (ILSVRC 2012), in the order of their WordNet ids, 0 tench to" in card
    folder, _ = make_run(policy__var=var | {"num_classes": 999}, **weights, run__dir=str(folder.path) + "2")
    assert "ImageNet" not in model_card("m.pth", folder, 2)


def test_a_run_that_is_going_on_is_read_all_the_same(make_run, tmp_path):
    folder, _ = make_run()
    with folder.held():
        assert main([f"checkpoint={folder.path}", f"out={tmp_path / 'x.pth'}"]) == 0


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"rows": 5}', '{"rows": [5]}', '{"rows": [{"name": "x"}]}', "[" * 5000, '{"rows": "\\ud800"}'],
)
def test_a_damaged_evaluation_is_left_out_of_the_card(make_run, tmp_path, content):
    folder, _ = make_run()
    (folder.path / "evaluation").mkdir()
    (folder.path / "evaluation" / "evaluation.json").write_text(content)
    assert main([f"checkpoint={folder.path}", f"out={tmp_path / 'x.pth'}"]) == 0
    assert "`evaluation/evaluation.json` is left out, as it is damaged: " in (tmp_path / "x.md").read_text()
