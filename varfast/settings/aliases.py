"""The names that TRL, diffusers, flow_grpo, accelerate and similar packages use for our keys."""

from __future__ import annotations

# Their names, and for each our key with a remark. Of several keys, those that the command has are suggested. An empty
# key means that we have none; the remark says why.
_TABLE: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = (
    ("learning_rate base_lr max_lr peak_lr", (("update.lr", ""),)),
    (
        "beta kl_coef kl_coeff kl_loss_coef init_kl_coef kl_weight kl_penalty",
        (("grpo.kl_beta", "weight of the KL to the base; TRL's default is 0, here it is the paper's 0.2"),),
    ),
    ("cdpo_eps", (("dpo.label_smoothing", ""),)),
    (
        "num_generations num_image_per_prompt num_return_sequences group",
        (("rollout.group_size", "images a label"), ("samples_per_label", ""), ("rollout.group_size", "images a label")),
    ),
    (
        "num_samples num_images num_images_per_prompt n_samples n nrow",
        (("samples_per_label", ""), ("rollout.group_size", "images a label")),
    ),
    ("output_dir save_dir logdir log_dir logging_dir project_dir outdir out", (("run.dir", ""), ("out", ""))),
    ("output output_path output_file save_path save_to outfile", (("out", ""), ("run.dir", ""))),
    (
        "max_steps max_train_steps total_steps num_steps train_steps iterations",
        (
            ("run.steps", "rollouts; each is followed by several optimizer steps"),
            ("", "VAR samples its scales in one pass: there are no denoising steps"),
        ),
    ),
    (
        "num_train_epochs num_epochs train_epochs",
        (("run.steps", "a number of rollouts; update.epochs are passes over one rollout"),),
    ),
    ("num_iterations num_inner_epochs ppo_epochs num_ppo_epochs mu", (("update.epochs", "passes over a rollout"),)),
    (
        "guidance_scale cfg_scale guidance cfg",
        (("cfg", "0 is off"), ("rollout.cfg", "guidance as a part of the policy that is trained; 0 is off")),
    ),
    ("top_k top_p", (("", "training samples without filters; they belong to sample and evaluate"),)),
    (
        "num_inference_steps sampling_steps num_denoising_steps",
        (("", "VAR samples its scales in one pass: there are no denoising steps"),),
    ),
    (
        "per_device_train_batch_size train_batch_size mini_batch_size ppo_mini_batch_size",
        (
            ("update.minibatch", "images an optimizer step, over all processes together"),
            ("update.micro_batch", "images a forward and backward pass; what a minibatch has more is accumulated"),
        ),
    ),
    (
        "batch_size",
        (
            ("update.minibatch", "images an optimizer step, over all processes together"),
            ("update.micro_batch", "images a forward and backward pass; what a minibatch has more is accumulated"),
            ("micro_batch", "images at a time"),
        ),
    ),
    (
        "gradient_accumulation_steps accumulation_steps grad_accum",
        (("update.micro_batch", "images a forward and backward pass; what a minibatch has more is accumulated"),),
    ),
    (
        "per_device_eval_batch_size eval_batch_size sample_batch_size",
        (("rollout.micro_batch", "images sampled at a time"), ("micro_batch", "images at a time")),
    ),
    ("num_labels prompts_per_step num_prompts", (("rollout.labels_per_step", ""),)),
    ("epsilon clip_range cliprange clip_ratio eps_clip clip", (("grpo.clip_eps", ""),)),
    ("max_grad_norm gradient_clip_val clip_grad clip_grad_norm grad_norm", (("update.grad_clip", ""),)),
    ("adam_beta1 adam_beta2 beta1 beta2", (("update.betas", "both in one list, as [0.9, 0.999]"),)),
    ("adam_epsilon adam_eps", (("", "AdamW's epsilon is PyTorch's, 1e-8"),)),
    ("adam_weight_decay wd", (("update.weight_decay", ""),)),
    ("lr_scheduler_type lr_scheduler scheduler lr_decay_style", (("update.lr_schedule", ""),)),
    ("warmup_ratio", (("update.warmup_share", "of run.steps"),)),
    (
        "num_warmup_steps lr_warmup_steps warmup warmup_iters",
        (("update.warmup_steps", "a number of rollouts; a share of the run is update.warmup_share"),),
    ),
    ("optim optimizer_type use_8bit_adam", (("update.optimizer", "adamw, apex or adamw8bit"),)),
    ("ema use_ema ema_rate ema_momentum", (("update.ema_decay", "as 0.999; null is off"),)),
    (
        "gradient_checkpointing activation_checkpointing recompute",
        (("update.checkpointing", "auto, none, attention or full"),),
    ),
    ("random_seed manual_seed generator", (("run.seed", ""), ("seed", ""))),
    (
        "bf16 fp16 mixed_precision precision torch_dtype weight_dtype amp",
        (("run.dtype", "float32, bfloat16 or auto"), ("dtype", "float32 or bfloat16")),
    ),
    (
        "wandb_project report_to use_wandb log_with logger project project_name",
        (("log.wandb", "the name of the project; or log.trackio, log.mlflow, log.swanlab"),),
    ),
    ("logging_steps log_every log_interval log_freq", (("", "every step is written to metrics.jsonl"),)),
    (
        "save_steps checkpointing_steps save_freq save_every save_interval checkpoint_interval",
        (("log.checkpoint_every", ""),),
    ),
    ("save_total_limit checkpoints_total_limit num_checkpoint_limit max_checkpoints", (("log.keep_last", ""),)),
    ("load_best_model_at_end save_best", (("log.keep_best", ""),)),
    (
        "eval_steps eval_freq eval_every validation_steps",
        (("", "a run is evaluated before and after; see log.grid_every for pictures in between"),),
    ),
    (
        "resume_from_checkpoint resume_from resume auto_resume",
        (("", "the same command on the same run.dir goes on where it stopped"),),
    ),
    (
        "reward_funcs reward_func reward_fn reward_function reward_model rewards",
        (("reward", "as reward: {mine: {type: function, function: my_rewards:score}}"),),
    ),
    ("reward_weights", (("reward", "each has its weight, as reward.bright.weight=0.5"),)),
    (
        "ref_model_sync_steps sync_ref_model ref_update_steps",
        (
            ("grpo.reference_every", "rollouts after which the policy becomes the reference"),
            ("dpo.reference_every", "a round of DPO"),
        ),
    ),
    ("ref_model_mixup_alpha", (("grpo.reference_ema", "the reference as an average of the policy, such as 0.999"),)),
    ("scale_rewards", (("grpo.normalise_std", "true: divided by the group's standard deviation, as in the paper"),)),
    (
        "multi_objective_aggregation",
        (("grpo.combine", "sum_then_normalise or normalise_then_sum"),),
    ),
    ("global_std", (("reward", "each may have normalise: batch, over the whole step, or group"),)),
    ("importance_sampling_level", (("grpo.ratio", "token or sequence"),)),
    ("use_bias_correction_kl", (("grpo.kl_gradient", "k3 or unbiased"),)),
    ("entropy_coef entropy_coeff ent_coef entropy_bonus", (("grpo.entropy.coef", "of an adaptive bonus"),)),
    (
        "model model_name model_path model_name_or_path base_model ckpt ckpt_path pretrained_model "
        "pretrained_model_name_or_path weights var_ckpt",
        (("policy.checkpoint", ""), ("checkpoint", "")),
    ),
    ("vae vae_path vae_ckpt vae_model_name_or_path", (("policy.vqvae_checkpoint", ""), ("vqvae", ""))),
    ("use_lora use_peft peft_config", (("policy.lora", "{} for its defaults"),)),
    ("lora_r lora_rank r", (("policy.lora.rank", ""),)),
    ("lora_alpha", (("policy.lora.alpha", ""),)),
    ("target_modules lora_target_modules", (("policy.lora.targets", ""),)),
    (
        "lora_dropout dropout",
        (("", "an adapter has no dropout: a log-probability must describe the policy that was sampled"),),
    ),
    (
        "dataset dataset_name train_dataset train_data_dir data_dir data_path data",
        (
            ("prompts.source", "texts, of models that are conditioned on them"),
            ("pretrain.dataset", "images, for the base model; the run itself needs labels or prompts alone"),
        ),
    ),
    ("dataloader_num_workers workers", (("pretrain.num_workers", ""),)),
    (
        "resolution image_size img_size height width",
        (
            ("policy.vqvae", "the side is the last of patch_nums times its downsampling"),
            ("", "the model has one size of image"),
        ),
    ),
    (
        "prompt prompts text texts",
        (
            ("prompts.source", "of a model that is conditioned on text"),
            ("rollout.labels", "numbers or names"),
            ("prompts", "of a model that is conditioned on text"),
            ("labels", "numbers or names"),
        ),
    ),
    (
        "classes class_labels class_ids class_id label class",
        (("rollout.labels", "numbers or names"), ("labels", "numbers or names")),
    ),
    ("negative_prompt", (("", "guidance moves away from the model without a label or text; its strength is cfg"),)),
    (
        "gpus num_gpus n_gpus ngpus nproc num_processes world_size",
        (("", "torchrun --nproc-per-node 8 -m varfast.train CONFIG starts 8 processes, one a GPU"),),
    ),
    ("metrics metric", (("fid_reference", "for FID and its kin"), ("scores", "rewards"), ("classifier", "accuracy"))),
    (
        "overwrite_output_dir overwrite force exist_ok",
        (("overwrite", ""), ("", "another run is another run.dir; a picture, a report or a table is written anew")),
    ),
    ("dry_run", (("", "varfast roofline predicts time and memory; run.steps=1 tries a step"),)),
    (
        "debug verbose quiet log_level loglevel",
        (("", "there are no levels; metrics.jsonl has every step's numbers, and --profile its trace"),),
    ),
    ("deepspeed fsdp strategy ddp", (("run.parallel", "auto, ddp or fsdp"),)),
    ("ref_dir real_images fid_ref reference_images fid", (("fid_reference", ""),)),
    ("cuda gpu gpu_id", (("run.device", "auto, cpu, cuda or cuda:0"), ("device", "auto, cpu, cuda or cuda:0"))),
)
ALIASES = {name: meanings for names, meanings in _TABLE for name in names.split()}
