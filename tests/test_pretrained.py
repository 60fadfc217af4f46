"""A policy that is saved as a folder, read back, and handed to the hub."""

import json
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, OfflineModeIsEnabled
from safetensors.torch import load_file

import varfast
from varfast import InputError, load_policy
from varfast.data.labels import imagenet, label_names
from varfast.evaluation.arguments import resolved
from varfast.evaluation.config import EvaluateConfig
from varfast.policies.config import LoRAConfig
from varfast.policies.families import family_named, section_named
from varfast.runs.folder import RunFolder
from varfast.runs.load import load_base
from varfast.sample import main as sample
from varfast.train import train
from varfast.weights import hub

from .janus import TINY as JANUS
from .janus import tiny_policy as tiny_janus

CPU = torch.device("cpu")
VQ = {"base_channels": 32, "channel_multipliers": [1, 1], "num_res_blocks": 1, "latent_width": 32, "code_width": 4}
BLOCKS = {"depth": 2, "width": 32, "num_heads": 4, "num_classes": 5, "vocab_size": 24, "side": 3}
SIZES = {
    "var": {"var": {"depth": 1, "patch_nums": [1, 2], "vocab_size": 16, "code_width": 4, "num_classes": 5},
            "vqvae": {"base_channels": 32, "channel_multipliers": [1], "num_res_blocks": 1}},
    "llamagen": {"gpt": BLOCKS | {"num_kv_heads": 2, "norm_eps": 1e-4}, "vq": VQ},
    "taming": {"transformer": BLOCKS | {"block_size": 12}, "vqgan": VQ},
    "janus": {k: v for k, v in JANUS.items() if k != "family"},
}  # fmt: skip
FILES = {
    "var": {"var.safetensors", "vqvae.safetensors"},
    "llamagen": {"gpt.safetensors", "vq.safetensors"},
    "taming": {"transformer.safetensors", "vqgan.safetensors"},
    "janus": {"model.safetensors", "tokenizer.json"},
}


def make(family, seed=3, **options):
    if family == "janus":
        return tiny_janus(**options)
    section = section_named(family)(family=family, checkpoint="random", **SIZES[family])
    build = family_named(family)
    return build.assemble(build.random_parts(section, seed, CPU), CPU, "float32", **options)


def drawn(policy):
    prompts = ["a cat", "the red sea"] if policy.family == "janus" else [0, 4]
    cfg = 0.0 if policy.family == "taming" else 2.0
    return policy.sample(prompts, seed=1, cfg=cfg)


def same(a, b):
    a, b = drawn(a), drawn(b)
    return torch.equal(a.tokens_BL, b.tokens_BL) and torch.equal(a.logp_BL, b.logp_BL)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Of each family a policy, and the folder that it was saved as."""
    place = tmp_path_factory.mktemp("models")
    policies = {family: make(family) for family in SIZES}
    return {family: (policy, policy.save_pretrained(place / family)) for family, policy in policies.items()}


@pytest.mark.parametrize("family", SIZES)
def test_save_pretrained_comes_back_bit_for_bit(folders, family):
    policy, folder = folders[family]
    assert {path.name for path in folder.iterdir()} == FILES[family] | {"config.json", "README.md"}
    for back in (load_policy(folder), type(policy).from_pretrained(folder)):
        assert type(back) is type(policy)
        for name, module in policy.parts.items():
            state, found = module.state_dict(), back.parts[name].state_dict()
            assert list(found) == list(state)
            assert all(torch.equal(found[n], t) and found[n].dtype == t.dtype for n, t in state.items())
            assert back.parts[name].config == module.config
        tokens_BL = drawn(policy).tokens_BL
        assert same(policy, back)
        assert torch.equal(policy.decode(tokens_BL), back.decode(tokens_BL))


@pytest.mark.parametrize("family", SIZES)
def test_the_files_have_the_names_that_the_familys_public_code_has(folders, family):
    policy, folder = folders[family]
    trained, frozen = (module.state_dict() for module in policy.parts.values())
    if family == "janus":
        prefixed = {f"gen_vision_model.{name}": tensor for name, tensor in frozen.items()}
        assert load_file(folder / "model.safetensors").keys() == trained.keys() | prefixed.keys()
    else:
        files = [load_file(folder / f"{part}.safetensors") for part in policy.parts]
        assert [file.keys() for file in files] == [trained.keys(), frozen.keys()]


@pytest.mark.parametrize("family", SIZES)
def test_the_card_is_valid_metadata_of_the_hub(folders, family):
    _, folder = folders[family]
    card = ModelCard.load(folder / "README.md")
    task = "text-to-image" if family == "janus" else "unconditional-image-generation"
    assert (card.data.library_name, card.data.pipeline_tag, card.data.license) == ("varfast", task, None)
    assert family in card.data.tags
    assert ("class-conditional" in card.data.tags) == (family != "janus")
    assert str(folder.parent) not in card.content
    config = json.loads((folder / "config.json").read_text())
    assert (config["library_name"], config["varfast_version"]) == ("varfast", varfast.__version__)
    assert str(folder.parent) not in json.dumps(config)


def test_a_saved_bfloat16_is_rounded_once_and_an_adapter_is_merged(tmp_path):
    policy = make("var")
    policy.save_pretrained(tmp_path / "half", dtype="bfloat16")
    rounded = load_file(tmp_path / "half" / "var.safetensors")
    assert all(
        torch.equal(rounded[n], t.bfloat16()) for n, t in policy.var.state_dict().items() if t.is_floating_point()
    )
    pytest.importorskip("peft")
    adapted = make("var")
    adapted.add_lora(LoRAConfig(rank=2, targets=("fc1",)), 0)
    with torch.no_grad():
        for name, parameter in adapted.var.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.01)
    adapted.save_pretrained(tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "var.safetensors")
    changed = {name for name, tensor in policy.var.state_dict().items() if not torch.equal(tensor, merged[name])}
    assert changed == {"blocks.0.ffn.fc1.weight"}
    torch.testing.assert_close(drawn(load_policy(tmp_path / "merged")).logp_BL, drawn(adapted).logp_BL)


def test_what_a_saved_model_is_called_stays_with_it(tmp_path, capsys):
    policy = make("var")
    policy.label_names, policy.base_model = ["red", "green", "blue", "a|b", "\x1b[2J"], "owner/base"
    folder = policy.save_pretrained(tmp_path / "model")
    back = load_policy(folder)
    assert (back.label_names, back.base_model) == (["red", "green", "blue", "a|b", "\\x1b[2J"], "owner/base")
    assert label_names(folder, 5) == back.label_names
    assert ModelCard.load(folder / "README.md").data.base_model == "owner/base"
    assert "| 3 | a\\|b |" in (folder / "README.md").read_text()
    assert sample([f"checkpoint={folder}", f"out={tmp_path / 'a.png'}", "labels=[green]", "device=cpu"]) == 0
    assert "1 label x 8 samples, seed 0" in capsys.readouterr().out


def test_a_readme_of_ones_own_is_kept_and_a_run_folder_is_refused(tmp_path, make_config):
    policy, folder = make("var"), tmp_path / "model"
    folder.mkdir()
    (folder / "README.md").write_text("mine")
    policy.save_pretrained(folder)
    assert (folder / "README.md").read_text() == "mine"
    (folder / "config.yaml").write_text("run: {}")
    with pytest.raises(InputError, match="model is a run folder; choose another one"):
        policy.save_pretrained(folder)


def test_from_pretrained_says_what_it_cannot_read(folders, tmp_path):
    with pytest.raises(InputError, match=r"is a model of the family llamagen, and no VARPolicy; varfast.load_policy"):
        varfast.Policy.from_pretrained(folders["llamagen"][1])
    with pytest.raises(InputError, match="is no folder or repository that save_pretrained wrote: it has no config"):
        varfast.Policy.from_pretrained(tmp_path)
    with pytest.raises(InputError, match="revision=main: .* is no repository of the hub"):
        varfast.Policy.from_pretrained(folders["var"][1], revision="main")
    with pytest.raises(InputError, match="is a saved model, whose config says the sizes; give no sizes beside it"):
        load_policy(folders["var"][1], var_config=varfast.models.VARConfig())


# ---------------------------------------------------------------------------------------------------------------------
# A config.json that somebody made up


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["policy"].update(family="evil"), "policy.family=evil, and this version of varfast knows var, l"),
        (lambda c: c["policy"].update(checkpoint="/etc/passwd"), "policy.checkpoint has no place in a saved model"),
        (lambda c: c["policy"].update(vqvae_checkpoint="hf://a/b/c.pth"), "policy.vqvae_checkpoint has no place"),
        (lambda c: c["policy"]["var"].update(depth=10**9), "var.depth: got 1000000000; want a whole number from 1"),
        (lambda c: c["policy"]["var"].update(depth=2), "does not fit the configured VAR"),
        (lambda c: c.update(labels=["a"]), "names 1 labels, and the model has 5"),
        (lambda c: c.update(labels=[{"a": 1}] * 5), r"is damaged, or no saved model of varfast: labels.0: "),
        (lambda c: c.update(policy="\x1b[2J"), "is damaged, or no saved model of varfast: policy: "),
        (lambda c: c.pop("image_size"), "image_size: Field required"),
    ],
)  # fmt: skip
def test_a_config_json_that_somebody_made_up_is_refused_in_words(folders, tmp_path, change, message):
    folder = make("var").save_pretrained(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=message) as error:
        load_policy(folder)
    assert "\x1b" not in str(error.value)


@pytest.mark.parametrize("content", ["", "[", '{"library_name": "varfast"', "[" * 5000, '{"a": "\\ud800"}'])
def test_a_damaged_config_json_is_named(tmp_path, content):
    folder = make("var").save_pretrained(tmp_path / "model")
    (folder / "config.json").write_text(content)
    with pytest.raises(InputError, match=r"config.json is damaged"):
        load_policy(folder)


def test_weights_of_a_saved_model_run_no_code(tmp_path):
    folder = make("var").save_pretrained(tmp_path / "model")
    torch.save({"a": print}, folder / "var.safetensors")
    with pytest.raises(InputError, match="holds more than tensors: .*print"):
        load_policy(folder)


# ---------------------------------------------------------------------------------------------------------------------
# A run from a saved model


@pytest.mark.parametrize("family", ["var", "janus"])
def test_a_run_starts_from_a_saved_model(folders, make_config, tmp_path, family):
    policy, folder = folders[family]
    (tmp_path / "prompts.txt").write_text("a cat\nthe red sea\n")
    more = {"prompts": {"source": str(tmp_path / "prompts.txt")}} if family == "janus" else {}
    section = SIZES[family] | {"family": family, "checkpoint": str(folder)}
    config = make_config(policy=section, run__steps=1, eval__samples_per_label=0, **more)
    assert train(config) == 0
    assert same(policy, load_base(config, RunFolder(config.run.dir), CPU))
    assert load_policy(config.run.dir).label_names is None
    with pytest.raises(InputError, match=f"is a model of the family {family}, and policy.family is llamagen"):
        train(make_config(policy=SIZES["llamagen"] | {"family": "llamagen", "checkpoint": str(folder)},
                          run__dir=str(tmp_path / "other")))  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# The hub, without a network


@pytest.fixture
def repositories(folders, monkeypatch):
    """A hub of the saved models, as me/FAMILY; the files that were asked for."""
    asked = []

    def download(repo_id, filename, revision=None):
        asked.append((repo_id, filename, revision))
        found = folders[repo_id.removeprefix("me/")][1] / filename
        if not found.exists():
            raise type("Missing", (EntryNotFoundError,), {"__init__": Exception.__init__})(filename)
        return str(found)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    return asked


@pytest.mark.parametrize("family", SIZES)
def test_a_repository_is_read_as_its_folder_is(folders, repositories, family):
    policy, _ = folders[family]
    assert same(policy, load_policy(f"hf://me/{family}"))
    assert {name for _, name, _ in repositories} <= FILES[family] | {"config.json", "model.safetensors.index.json"}
    assert same(policy, load_policy(f"me/{family}"))
    repositories.clear()
    assert same(policy, type(policy).from_pretrained(f"me/{family}", revision="v1"))
    assert {revision for _, _, revision in repositories} == {"v1"}


def test_a_path_that_is_there_is_no_repository(folders, monkeypatch, tmp_path):
    monkeypatch.chdir(folders["var"][1].parent.parent)
    relative = "/".join(folders["var"][1].parts[-2:])
    assert same(folders["var"][0], load_policy(relative))
    asked = []
    monkeypatch.setattr(hub, "fetch_from_hub", asked.append)
    with pytest.raises(InputError, match=r"checkpoint=runs/nope does not exist"):
        sample(["checkpoint=runs/nope", f"out={tmp_path / 'a.png'}"])
    assert asked == []


def test_a_repository_that_is_none_is_said_as_it_was_given(repositories, folders, tmp_path, monkeypatch):
    monkeypatch.setitem(folders, "none", (None, tmp_path))
    with pytest.raises(
        InputError, match=r"me/none is not on this disk, so it was taken for a repository: checkpoint hf"
    ):
        load_policy("me/none")
    (tmp_path / "config.json").write_text('{"model_type": "multi_modality"}')
    for load in (load_policy, varfast.Policy.from_pretrained):
        with pytest.raises(InputError, match=r"or no saved model of varfast: library_name: Field required"):
            load("hf://me/none")


def test_evaluate_takes_a_saved_model_with_its_family(folders):
    task = resolved(EvaluateConfig(checkpoint=str(folders["llamagen"][1]), reference=str(folders["llamagen"][1])))
    assert (task.family, task.reference, task.vqvae) == ("llamagen", str(folders["llamagen"][1]), None)


class FakeHub:
    """In place of huggingface_hub.HfApi: what it was asked to do, and an error where one is due."""

    def __init__(self, error=None):
        self.calls, self.error, self.files = [], error, {}

    def __call__(self, token=None):
        self.calls.append(("token", token))
        return self

    def create_repo(self, repo_id, private, exist_ok):
        if self.error is not None:
            raise self.error
        self.calls.append(("create", repo_id, private, exist_ok))
        return SimpleNamespace(repo_id=repo_id if "/" in repo_id else f"me/{repo_id}")

    def create_branch(self, repo_id, branch, exist_ok):
        self.calls.append(("branch", repo_id, branch, exist_ok))

    def upload_folder(self, repo_id, folder_path, revision, commit_message, allow_patterns, delete_patterns):
        from pathlib import Path

        self.calls.append(("upload", repo_id, revision, commit_message, delete_patterns))
        self.files = {name: (Path(folder_path) / name).read_bytes() for name in allow_patterns}
        return SimpleNamespace(commit_url=f"https://huggingface.co/{repo_id}/commit/1")


@pytest.fixture
def fake_hub(monkeypatch):
    def fake(error=None, login="t"):
        api = FakeHub(error)
        monkeypatch.setattr("huggingface_hub.HfApi", api)
        monkeypatch.setattr("huggingface_hub.get_token", lambda: login)
        return api

    return fake


def test_push_to_hub_uploads_what_save_pretrained_writes(folders, fake_hub):
    policy, folder = folders["janus"]
    api = fake_hub(login=None)
    address = policy.push_to_hub("me/cats", private=True, token="secret", revision="v2", commit_message="the first")
    assert address == "https://huggingface.co/me/cats/commit/1"
    stale = ["model-*-of-*.safetensors", "model.safetensors.index.json"]
    assert api.calls == [("token", "secret"), ("create", "me/cats", True, True), ("branch", "me/cats", "v2", True),
                         ("upload", "me/cats", "v2", "the first", stale)]  # fmt: skip
    assert api.files.keys() == FILES["janus"] | {"config.json", "README.md"}
    for name in FILES["janus"] | {"config.json"}:
        assert api.files[name] == (folder / name).read_bytes()
    assert "load_policy('me/cats')" in api.files["README.md"].decode()


def answer(status, message="no"):
    response = SimpleNamespace(status_code=status, headers={}, request=None, url="")
    error = type("Answer", (HfHubHTTPError,), {"__init__": Exception.__init__})(message)
    error.response = response
    return error


@pytest.mark.parametrize(
    ("error", "login", "message"),
    [
        (
            None,
            None,
            r"me/cats cannot be written: there is no login for the hub; log in with `hf auth login`, set",
        ),
        (answer(401), "t", r"does not accept the login \(401\); log in with"),
        (answer(403), "t", r"the token may not write to me/cats \(403\): make one with the right to write"),
        (OfflineModeIsEnabled("no"), "t", "HF_HUB_OFFLINE is set; unset it"),
        (answer(503), "t", r"has a fault \(503\); try again later"),
        (ConnectionError("[Errno -2] Name or service not known"), "t", "Name or service not known"),
    ],
)
def test_push_to_hub_says_what_to_do(folders, fake_hub, error, login, message):
    fake_hub(error, login)
    with pytest.raises(InputError, match=message):
        folders["var"][0].push_to_hub("me/cats")


@pytest.mark.parametrize("name", ["a/b/c", "", "me/", "../x", "me/ca ts", "hf://me/cats/file"])
def test_push_to_hub_refuses_what_is_no_repository(folders, fake_hub, name):
    api = fake_hub()
    with pytest.raises(InputError, match="is no repository of the hub; want owner/name"):
        folders["var"][0].push_to_hub(name)
    assert api.calls == []


def test_imagenets_labels_are_named_once(tmp_path):
    from varfast.cards.model import label_section

    rows = [[i, name] for i, name in enumerate(imagenet().values())]
    assert label_section(rows).endswith("0 tench to 999 toilet tissue.")
