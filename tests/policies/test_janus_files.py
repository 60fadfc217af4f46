"""Janus-Pro from files and back: public layouts, published names, a run of an adapter and its export."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError

from varfast import InputError, load_policy
from varfast.evaluation.arguments import resolved
from varfast.evaluation.config import EvaluateConfig
from varfast.export import main as export
from varfast.policies.janus import build
from varfast.policies.janus.config import PRESETS, JanusConfig, JanusLoRAConfig, JanusPolicyConfig
from varfast.policies.janus.text import TextTokenizer
from varfast.policies.janus.transformer import Janus
from varfast.policies.janus.weights import infer_janus_config, load_janus
from varfast.policies.nexttoken.tokenizer import Tokenizer
from varfast.policies.nexttoken.tokenizer_config import TokenizerConfig
from varfast.policies.nexttoken.tokenizer_weights import load_tokenizer
from varfast.runs.folder import RunFolder
from varfast.train import train

from ..janus import TEXTS, TINY, of_transformer, sizes_of, tiny_policy, whole_checkpoint, write_folder
from ..published import checkpoint, golden, published


@pytest.mark.parametrize(("suffix", "files"), [(".safetensors", 1), (".safetensors", 3), (".bin", 1), (".bin", 2)])
def test_a_folder_as_transformers_writes_it_is_loaded(tmp_path, suffix, files, capsys):
    state, config = whole_checkpoint(), sizes_of(golden("janus").meta)
    folder = write_folder(tmp_path / "model", state, suffix, files)
    loaded = load_janus(folder, config).state_dict()
    said = capsys.readouterr().out
    assert all(part in said for part in ("vision_model", "aligner", "language_model.lm_head", "are left out"))
    wanted = of_transformer(state)
    assert list(loaded) == list(wanted)  # and so an export has the public names, in their order
    assert all(torch.equal(loaded[name], tensor) for name, tensor in wanted.items())
    tokenizer = load_tokenizer(folder, TokenizerConfig).state_dict()
    assert all(torch.equal(t, state[f"gen_vision_model.{n}"]) for n, t in tokenizer.items() if "codebook_used" not in n)
    if files > 1:
        index = next((tmp_path / "model").glob("*.index.json"))
        assert torch.equal(load_janus(str(index), config).state_dict()["gen_embed.weight"], state["gen_embed.weight"])


def test_a_checkpoint_that_does_not_fit_says_so(tmp_path):
    state, config = whole_checkpoint(), sizes_of(golden("janus").meta)
    cases = [
        (state | {"language_model.model.surplus": torch.ones(1)}, "1 unexpected: language_model.model.surplus"),
        ({name: t for name, t in state.items() if "up_proj" not in name}, "2 missing: .*layers.0.mlp.up_proj.weight"),
        ({"model.generation_embeddings.weight": torch.ones(2, 2)}, "Janus under the names of transformers' own port"),
        (checkpoint("llamagen", "gpt."), "is not Janus-Pro's language model: it has no gen_embed.weight.* LlamaGen's"),
    ]
    for number, (content, message) in enumerate(cases):
        with pytest.raises(InputError, match=message):
            load_janus(write_folder(tmp_path / str(number), content), config)
    with pytest.raises(InputError, match=r"does not fit the configured Janus; it fits policy.transformer with depth=2"):
        load_janus(str(tmp_path / "0"), config.model_copy(update={"depth": 3}))
    folder = write_folder(tmp_path / "parts", state, files=2)
    (tmp_path / "parts" / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(InputError, match=r"model-00002-of-00002.safetensors does not exist"):
        load_janus(folder, config)
    (tmp_path / "parts" / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../secret.bin"}}')
    with pytest.raises(InputError, match=r"names '../../secret.bin'; want .safetensors or .bin files in its own"):
        load_janus(folder, config)
    (tmp_path / "none").mkdir()
    with pytest.raises(InputError, match=r"none is a folder without weights; want model.safetensors.index.json, model"):
        load_janus(str(tmp_path / "none"), config)


def public_state(name):
    """A published state_dict on the meta device, without the tower for understanding."""
    public = published("janus")[f"Janus-Pro-{name}"]
    state = dict(public["other"])
    for layer in range(public["language"]["num_hidden_layers"]):
        for part, shape in public["each_language_layer"].items():
            state[part.replace("language_model.model.", f"language_model.model.layers.{layer}.")] = shape
    return {name: torch.empty(shape, device="meta") for name, shape in state.items()}


@pytest.mark.parametrize("preset", PRESETS)
def test_published_names_load_strictly(preset):
    state, public = public_state(preset), published("janus")[f"Janus-Pro-{preset}"]
    with torch.device("meta"):
        model, tokenizer = Janus(PRESETS[preset]), Tokenizer(TokenizerConfig())
    wanted = of_transformer(state)
    assert infer_janus_config(wanted) == PRESETS[preset]
    model.load_state_dict(wanted, strict=True, assign=True)
    prefix = "gen_vision_model."
    of_tokenizer = {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}
    tokenizer.load_state_dict(of_tokenizer, strict=True, assign=True)
    skipped = sum(t.numel() for name, t in state.items() if name.startswith(("aligner.", "language_model.lm_head.")))
    count = sum(p.numel() for each in (model, tokenizer) for p in each.parameters())
    tower = public["params"] - count - skipped
    assert 300e6 < tower < 330e6  # SigLIP-L, of which only some names are published here
    lm_head = PRESETS[preset].text_vocab_size * PRESETS[preset].width
    in_language = sum(p.numel() for name, p in model.named_parameters() if name.startswith("language_model."))
    assert in_language + lm_head == public["params_language"]
    cost = build.cost_of(JanusPolicyConfig(checkpoint="random", preset=preset), "bfloat16")
    assert cost.weights.parameters == sum(p.numel() for p in model.parameters())


def run_config(make_config, tmp_path, **more):
    (tmp_path / "prompts.txt").write_text("".join(f"{text}\n" for text in TEXTS))
    options = {"policy": TINY | {"checkpoint": "random"}, "prompts": {"source": str(tmp_path / "prompts.txt")},
               "update__lr": 1e-3, "run__steps": 2}  # fmt: skip
    return make_config(**options | more)


def test_a_run_from_a_sharded_folder_trains_an_adapter_and_is_exported(make_config, tmp_path):
    pytest.importorskip("peft")
    source = tiny_policy()
    parts = {name: model.state_dict() for name, model in source.parts.items()}
    state = parts["transformer"] | {f"gen_vision_model.{name}": t for name, t in parts["vq"].items()}
    folder = write_folder(tmp_path / "model", state | {"language_model.lm_head.weight": torch.zeros(300, 32)}, files=2)
    policy = TINY | {"checkpoint": folder, "lora": {"rank": 2}}
    for steps in (1, 2):
        config = run_config(make_config, tmp_path, policy=policy, rollout__cfg=3.0, run__steps=steps)
        assert train(config) == 0
        shutil.rmtree(folder, ignore_errors=True)  # the run folder has what it starts from, and goes on
    rows = [json.loads(line) for line in (Path(config.run.dir) / "metrics.jsonl").read_text().splitlines()]
    assert all(row["ratio_gap_max"] <= 1e-4 and row["grad_norm"] > 0 for row in rows)
    assert [row["step"] for row in rows] == [1, 2]
    run = load_policy(config.run.dir)
    assert run.sample(["a red sea"], seed=0, cfg=3.0).tokens_BL.shape == (1, 9)
    delivered = torch.load(RunFolder(config.run.dir).weights(config), weights_only=True)
    for number, how in enumerate([{}, {"shard_gb": 3e-4}]):
        out = tmp_path / str(number) / "model.safetensors"
        out.parent.mkdir()
        assert export([f"checkpoint={config.run.dir}", f"out={out}", *(f"{k}={v}" for k, v in how.items())]) == 0
        assert len(list(out.parent.glob("*.safetensors"))) == (5 if how else 1)
        assert "family='janus')" in out.with_suffix(".md").read_text()
        config_of_file = JanusConfig(**TINY["transformer"])
        exported = load_janus(str(out.parent), config_of_file).state_dict()
        assert list(exported) == list(delivered) == list(parts["transformer"])
        changed = {n.split(".")[-2] for n, t in exported.items() if not torch.equal(t, parts["transformer"][n])}
        assert changed
        assert changed <= set(JanusLoRAConfig().targets)
        for name, tensor in exported.items():
            torch.testing.assert_close(tensor, delivered[name], rtol=0, atol=1e-6)
        vq = load_tokenizer(str(out.parent), TokenizerConfig).state_dict()
        assert all(torch.equal(tensor, parts["vq"][name]) for name, tensor in vq.items())
        text = TextTokenizer.read(out.parent / "tokenizer.json")
        assert text.encode(["a red sea"]) == run.transformer.text.encode(["a red sea"])


def test_a_repository_of_the_hub_is_looked_through_for_its_weights(tmp_path, monkeypatch):
    state, config = whole_checkpoint(), sizes_of(golden("janus").meta)
    folder, asked = Path(write_folder(tmp_path / "snapshot", state, ".bin", 2)), []

    def download(repo_id, filename, **given):
        asked.append((repo_id, filename, given.get("revision")))
        if not (folder / filename).exists():
            raise type("Missing", (EntryNotFoundError,), {"__init__": Exception.__init__})(filename)
        return str(folder / filename)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    loaded = load_janus("hf://deepseek-ai/Janus-Pro-9B@main", config).state_dict()
    assert torch.equal(loaded["gen_embed.weight"], state["gen_embed.weight"])
    parts = [f"pytorch_model-0000{n}-of-00002.bin" for n in (1, 2)]
    names = ["model.safetensors.index.json", "model.safetensors", "pytorch_model.bin.index.json", *parts]
    assert asked == [("deepseek-ai/Janus-Pro-9B", name, "main") for name in names]
    asked.clear()
    load_tokenizer("hf://deepseek-ai/Janus-Pro-9B/pytorch_model.bin.index.json", TokenizerConfig)
    assert [name for _, name, _ in asked] == ["pytorch_model.bin.index.json", *parts]
    for path in folder.iterdir():
        path.unlink()
    with pytest.raises(
        InputError, match=r"hf://deepseek-ai/Janus-Pro-9B has none of model.safetensors.index.json, mod"
    ):
        load_janus("hf://deepseek-ai/Janus-Pro-9B", config)


def test_files_of_a_public_model_make_a_policy_with_its_text_tokenizer(tmp_path, monkeypatch):
    source = tiny_policy()
    state = source.transformer.state_dict() | {
        f"gen_vision_model.{name}": tensor for name, tensor in source.tokenizer.state_dict().items()
    }
    monkeypatch.setattr("varfast.policies.janus.weights.PRESETS", {"tiny": JanusConfig(**TINY["transformer"])})
    folder = write_folder(tmp_path / "model", state, files=2)
    task = resolved(EvaluateConfig(checkpoint=folder, reference=folder, family="janus"))
    assert (task.reference, task.family, task.vqvae, task.out) == (folder, "janus", None, Path("evaluation"))
    policy = load_policy(folder, family="janus")
    policy.set_prompts(TEXTS)
    tokens_BN = torch.zeros(4, policy.tokens_shape[0], dtype=torch.int64)
    tokens_BN[:, :9] = torch.arange(9)
    # Of 384 px as the public models: of more tokens, the first ones are as they were.
    with torch.no_grad():
        ours, theirs = policy.token_logp([0, 1, 2, 3], tokens_BN), source.token_logp([0, 1, 2, 3], tokens_BN[:, :9])
    torch.testing.assert_close(ours[:, :9], theirs, rtol=0, atol=1e-5)
