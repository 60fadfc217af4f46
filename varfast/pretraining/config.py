"""The section of the config that says how a base model is made. No PyTorch."""

from __future__ import annotations

from pydantic import Field

from varfast.settings.section import MANY, LocalPath, Section


class PretrainConfig(Section):
    """How the base model is made when policy.checkpoint is 'pretrain': for the digits, or for your own small folder."""

    dataset: LocalPath = Field(
        "digits",
        description="'digits' (scikit-learn), 'shapes' (36 labels, drawn by varfast), or a folder with a sub-folder a "
        "class; for a model that is conditioned on text 'captioned_digits', 'captioned_shapes', or a folder with "
        "metadata.jsonl (file_name, text)",
    )
    cache_dir: LocalPath = Field(
        "~/.cache/varfast", description="where base models are kept, by a hash of what made them"
    )
    batch_size: int = Field(64, ge=1, le=1_000_000, description="images a step, for both models")
    num_workers: int = Field(0, ge=0, le=1024, description="processes that read images; 0 for data in memory")
    vqvae_steps: int = Field(1000, ge=1, le=MANY, description="optimizer steps of the tokenizer, the VQ-VAE")
    vqvae_lr: float = Field(1e-3, gt=0, le=1e9, description="peak learning rate of the tokenizer")
    codes_after: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of vqvae_steps at the beginning in which the tokenizer decodes its latents, while the codes "
        "follow them; pictures with many colours then need fewer steps",
    )
    var_steps: int = Field(1000, ge=1, le=MANY, description="optimizer steps of the transformer")
    var_lr: float = Field(1e-3, gt=0, le=1e9, description="peak learning rate of the transformer")
    weight_decay: float = Field(0.05, ge=0, le=1e6, description="of AdamW, for the transformer's matrices")
    class_dropout: float = Field(
        0.1,
        ge=0,
        lt=1,
        description="share of labels replaced by 'no label', and of texts by one that says nothing; taming's models "
        "have neither",
    )
    token_noise: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of the tokens that a next-token model reads which are replaced by random ones, so that its "
        "own mistakes are not new to it (1 - pkeep of taming-transformers)",
    )
    drop_path: float = Field(0.0, ge=0, lt=1, description="DropPath rate of the last block; it grows linearly from 0")
