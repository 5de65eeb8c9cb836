"""Each rule both ways: a config that breaks it and one, as near as can be, that keeps it."""

import pytest

from megatron.config.fields import all_flags, build, by_name
from megatron.config.idle import without_effect
from megatron.config.rules import (
    ABOVE_ZERO,
    AT_LEAST_ONE,
    NOT_NEGATIVE,
    broken,
    check,
    check_training,
)
from megatron.config.rules_model import MODEL_RULES
from megatron.config.rules_parallel import PARALLEL_RULES
from megatron.config.rules_run import RUN_RULES
from megatron.config.run import RunConfig
from megatron.errors import ConfigError

SIZES = {"num_layers": 4, "hidden_size": 32, "num_attention_heads": 4, "seq_length": 16}
RULES = {rule.__name__: rule for rule in (*MODEL_RULES, *PARALLEL_RULES, *RUN_RULES)}
EXITS = {"exit_layer_nums": (1, 2)}
PP2, TP = {"pipeline_model_parallel_size": 2}, {"tensor_model_parallel_size": 2}
LAYOUT = "pipeline_model_parallel_layout"
VIRTUAL, SCHEDULE = "num_layers_per_virtual_pipeline_stage", "pipeline_schedule"
FILL = {**PP2, **EXITS, "fill_explicit_bubbles": True}
ROPE = {"position_embedding_type": "rope"}
ITERS = {"train_iters": 10, "lr": 1e-3}
SAMPLES = {"train_samples": 1000, "lr": 1e-3}
RAMP = {"rampup_batch_size": (2, 2, 100), "global_batch_size": 8, **SAMPLES}
FULL = {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 2}
WSD = {"lr_decay_style": "WSD", "lr_wsd_decay_iters": 4, **ITERS}

# rule, settings that break it, settings that keep it, words of the complaint
CASES = [
    ("sizes_given", {"num_layers": None}, {}, "--num-layers is missing: give it"),
    ("sizes_given", {"seq_length": None, "load": "d"}, {"load": "d"}, "--use-checkpoint-args"),
    ("heads_divide_hidden", {"hidden_size": 30}, {"hidden_size": 30, "kv_channels": 8}, "4 does not divide"),
    (
        "groups_divide_heads",
        {"group_query_attention": True, "num_query_groups": 3},
        {"group_query_attention": True, "num_query_groups": 2},
        "--num-query-groups 3 does not divide --num-attention-heads 4",
    ),
    (
        "groups_need_gqa",
        {"num_query_groups": 2},
        {"num_query_groups": 2, "group_query_attention": True},
        "needs --group-query-attention",
    ),
    ("rotary_share", {"rotary_percent": 0.0}, {"rotary_percent": 0.5}, "(0, 1], got 0"),
    ("rotary_share", {"rotary_percent": 1.5}, {"rotary_percent": 1.0}, "(0, 1], got 1.5"),
    ("rotary_channels", {**ROPE, "kv_channels": 7}, {**ROPE, "kv_channels": 6}, "turn in pairs"),
    ("rotary_channels", {**ROPE, "rotary_percent": 0.1}, {**ROPE, "rotary_percent": 2.0}, "rotates 0"),
    (
        "rotary_scaling",
        {"rotary_seq_len_interpolation_factor": 2.0},
        {"rotary_seq_len_interpolation_factor": 2.0, **ROPE},
        "add --position-embedding-type rope",
    ),
    (
        "rotary_scaling",
        {"rotary_seq_len_interpolation_factor": 2.0, "use_rope_scaling": True, **ROPE},
        {"use_rope_scaling": True, **ROPE},
        "give one of them",
    ),
    (
        "rope_frequencies",
        {"use_rope_scaling": True, "rope_low_freq_factor": 4.0},
        {"rope_low_freq_factor": 4.0},
        "must be below --rope-high-freq-factor 4",
    ),
    (
        "sequence_fits_positions",
        {"max_position_embeddings": 15},
        {"max_position_embeddings": 16},
        "--seq-length 16 is longer than --max-position-embeddings 15",
    ),
    ("one_activation", {"swiglu": True, "squared_relu": True}, {"swiglu": True}, "--swiglu and --squared-relu"),
    ("gated_width", {"swiglu": True, "hidden_size": 16}, {"swiglu": True}, "give --ffn-hidden-size"),
    ("dropout_range", {"hidden_dropout": 1.0}, {"hidden_dropout": 0.99}, "--hidden-dropout must lie in [0, 1)"),
    ("dropout_range", {"attention_dropout": -0.1}, {"attention_dropout": 0.0}, "--attention-dropout"),
    (
        "padded_vocabulary",
        {"tokenizer_type": "NullTokenizer", "vocab_size": 512, "padded_vocab_size": 512},
        {"tokenizer_type": "NullTokenizer", "vocab_size": 511, "padded_vocab_size": 512},
        "give at least 513",
    ),
    ("exits_in_range", {"exit_layer_nums": (0,)}, {"exit_layer_nums": (1,)}, "counted from 1"),
    ("exits_in_range", {"exit_layer_nums": (5,)}, {"exit_layer_nums": (4, 2)}, "--num-layers is 4"),
    ("exits_distinct", {"exit_layer_nums": (2, 1, 2)}, EXITS, "names layer 2 more than once"),
    (
        "weights_match_exits",
        {"exit_layer_weight": (0.5,), **EXITS},
        {"exit_layer_weight": (0.5, 1.0), **EXITS},
        "--exit-layer-weight and --exit-layer-nums must correspond one to one: 1 weight(s) for 2 exit(s)",
    ),
    (
        "initial_weights_match_exits",
        {"exit_layer_weight_init": (0.5,)},
        {"exit_layer_weight_init": (0.5, 0.5), **EXITS},
        "must correspond one to one: 1 initial weight(s) for 0 exit(s)",
    ),
    (
        "temperatures_match_exits",
        {"exit_layer_temperature": (1.0, 1.0, 1.0), **EXITS},
        {"exit_layer_temperature": (1.0, 1.0), **EXITS},
        "must correspond one to one: 3 temperature(s) for 2 exit(s)",
    ),
    (
        "mlp_excludes_pre_exit",
        {"use_exit_mlp": True, "pre_exit": True, **EXITS},
        {"use_exit_mlp": True, **EXITS},
        "--use-exit-mlp and --pre-exit",
    ),
    ("parts_need_exits", {"use_exit_mlp": True}, {"use_exit_mlp": True, **EXITS}, "give --exit-layer-nums"),
    ("parts_need_exits", {"exit_norm": "own"}, {"exit_norm": "own", **EXITS}, "--exit-norm own"),
    ("weights_not_negative", {"exit_layer_weight": (-1.0,)}, {"exit_layer_weight": (0.0,)}, "got -1"),
    ("weights_not_negative", {"exit_layer_weight_init": (-1.0,)}, {}, "--exit-layer-weight-init"),
    ("temperatures_positive", {"exit_layer_temperature": (0.0,)}, {"exit_layer_temperature": (0.1,)}, "got 0"),
    (
        "layers_divide",
        {"pipeline_model_parallel_size": 3},
        {"pipeline_model_parallel_size": 2},
        "--pipeline-model-parallel-size 3 does not divide --num-layers 4",
    ),
    ("layers_divide", {**PP2, VIRTUAL: 3}, {**PP2, VIRTUAL: 1}, "3 on 2 pipeline ranks does not divide"),
    ("layers_divide", {**PP2, LAYOUT: "Et*5|L"}, {**PP2, LAYOUT: "Et*4|L"}, "it has 5 layers"),
    (
        "chunks_fit_the_schedule",
        {**PP2, SCHEDULE: "interleaved"},
        {**PP2, SCHEDULE: "interleaved", VIRTUAL: 1},
        "needs several stages",
    ),
    (
        "chunks_fit_the_schedule",
        {**PP2, SCHEDULE: "gpipe", LAYOUT: "Et|t|t|tL"},
        {**PP2, SCHEDULE: "gpipe", LAYOUT: "Et|t*3L"},
        "one stage a rank",
    ),
    ("chunks_fit_the_schedule", {**PP2, SCHEDULE: "zb-h1", VIRTUAL: 1}, {**PP2, SCHEDULE: "zb-h1"}, "one stage a rank"),
    (
        "schedule_from_a_file",
        {"schedule_file": "f", "exit_placement": "planned"},
        {"schedule_file": "f"},
        "says where everything runs",
    ),
    ("schedule_from_a_file", {"schedule_file": "f", SCHEDULE: "gpipe"}, {SCHEDULE: "gpipe"}, "exclude each other"),
    ("schedule_from_a_file", {"schedule_file": "f", **RAMP}, RAMP, "leave out --rampup-batch-size"),
    (
        "schedule_from_a_file",
        {"schedule_file": "f", "calculate_per_token_loss": True},
        {"calculate_per_token_loss": True},
        "partial microbatches count as others",
    ),
    ("filling", {**FILL, "pipeline_model_parallel_size": 1}, FILL, "--pipeline-model-parallel-size above 1"),
    ("split_backward_is_eager", {SCHEDULE: "zb-h1", "torch_compile": True}, {SCHEDULE: "zb-h1"}, "exclude each other"),
    ("filling", {**FILL, SCHEDULE: "gpipe"}, FILL, "the bubbles of --pipeline-schedule 1f1b"),
    ("filling", {**FILL, "calculate_per_token_loss": True}, FILL, "exclude each other"),
    ("filling", {**FILL, "exit_layer_nums": ()}, FILL, "needs exits"),
    (
        "heads_divide",
        {**TP, "num_attention_heads": 8, "tensor_model_parallel_size": 3},
        TP,
        "3 does not divide --num",
    ),
    (
        "heads_divide",
        {**TP, "group_query_attention": True, "num_query_groups": 1},
        {**TP, "group_query_attention": True, "num_query_groups": 2},
        "2 does not divide --num-query-groups 1",
    ),
    ("heads_divide", {**TP, "ffn_hidden_size": 33}, {**TP, "ffn_hidden_size": 34}, "(--ffn-hidden-size) 33"),
    ("vocabulary_divides", {**TP, "padded_vocab_size": 65}, {**TP, "padded_vocab_size": 66}, "--padded-vocab-size 65"),
    (
        "sequence_divides",
        {**TP, "sequence_parallel": True, "seq_length": 15},
        {**TP, "sequence_parallel": True},
        "2 does not divide --seq-length 15",
    ),
    (
        "data_paths_exclude",
        {"data_path": ("a",), "valid_data_path": ("b",)},
        {"train_data_path": ("a",), "valid_data_path": ("b",)},
        "--data-path and --valid-data-path exclude each other",
    ),
    ("blends_are_pairs", {"data_path": ("1", "a", "1")}, {"data_path": ("1", "a")}, "has 3 entries"),
    ("blends_are_pairs", {"data_path": ("a", "1")}, {"data_path": ("1", "a")}, "'a' stands where a weight"),
    ("blends_are_pairs", {"data_path": ("0", "a")}, {"data_path": ("0", "a", "1", "b")}, "all weights are 0"),
    ("blends_are_pairs", {"train_data_path": ("",)}, {"train_data_path": ("a",)}, "an empty word"),
    ("blends_are_pairs", {"test_data_path": ("inf", "a")}, {"test_data_path": (".5", "a")}, "--test-data-path"),
    ("split_is_sane", {"split": "a,b"}, {"split": "949/50/1"}, "--split 'a,b'"),
    ("split_is_sane", {"split": "1,1,1,1"}, {"split": "1,1,1"}, "at most three shares"),
    ("split_is_sane", {"split": "-1,2"}, {"split": "100"}, "at least 0"),
    ("split_is_sane", {"split": "0,0,0"}, {"split": "0,0,1"}, "--split"),
    ("split_is_sane", {"split": ""}, {"split": "1,,1"}, "--split ''"),
    (
        "tokenizer_files",
        {"tokenizer_type": "GPT2BPETokenizer", "vocab_file": "v"},
        {"tokenizer_type": "GPT2BPETokenizer", "vocab_file": "v", "merge_file": "m"},
        "--tokenizer-type GPT2BPETokenizer needs --merge-file",
    ),
    (
        "tokenizer_files",
        {"tokenizer_type": "Llama2Tokenizer"},
        {"tokenizer_type": "Llama2Tokenizer", "load": "checkpoint"},
        "needs --tokenizer-model",
    ),
    ("tokenizer_files", {"tokenizer_type": "NullTokenizer"}, {}, "needs --vocab-size"),
    ("one_length", {"train_iters": 1, "train_samples": 1}, {"train_iters": 1}, "exclude each other"),
    (
        "micro_divides_global",
        {"micro_batch_size": 3, "global_batch_size": 8},
        {"micro_batch_size": 4, "global_batch_size": 8},
        "--micro-batch-size 3 does not divide --global-batch-size 8",
    ),
    ("rampup_numbers", {"rampup_batch_size": (2, 2)}, RAMP, "three whole numbers, each above 0"),
    ("rampup_numbers", {"rampup_batch_size": (2, 0, 9)}, RAMP, "each above 0"),
    ("rampup_numbers", {"rampup_batch_size": (4, 2, 0)}, RAMP, "--rampup-batch-size 4 2 0: "),
    ("seed_range", {"seed": 2**32}, {"seed": 2**32 - 1}, "--seed must lie in [0, 2**32), got 4294967296"),
    ("seed_range", {"seed": -1}, {"seed": 0}, "got -1"),
    ("rampup_needs", {**RAMP, "train_samples": None}, RAMP, "needs --train-samples"),
    ("rampup_needs", {**RAMP, "global_batch_size": None}, RAMP, "needs --global-batch-size"),
    ("rampup_divides", {**RAMP, "rampup_batch_size": (2, 4, 9)}, RAMP, "4 does not lead from 2"),
    ("rampup_divides", {**RAMP, "global_batch_size": 1}, RAMP, "--global-batch-size 1"),
    ("rampup_divides", {**RAMP, "micro_batch_size": 4}, RAMP, "--micro-batch-size 4 must divide"),
    ("recompute_full", {"recompute_granularity": "full"}, FULL, "full needs --recompute-method"),
    ("recompute_full", {**FULL, "recompute_num_layers": None}, FULL, "full needs --recompute-num-layers"),
    (
        "recompute_others",
        {"recompute_granularity": "selective", "recompute_method": "block"},
        {"recompute_granularity": "selective"},
        "--recompute-method belongs to --recompute-granularity full",
    ),
    ("recompute_others", {"recompute_num_layers": 1}, FULL, "--recompute-num-layers belongs to"),
    ("recompute_depth", {**FULL, "recompute_num_layers": 5}, FULL, "5 is more than --num-layers 4"),
    (
        "weight_decay_style",
        {"weight_decay_incr_style": "linear", "start_weight_decay": 0.0},
        {"weight_decay_incr_style": "linear", "start_weight_decay": 0.0, "end_weight_decay": 0.1},
        "linear needs --end-weight-decay",
    ),
    ("weight_decay_style", {"start_weight_decay": 0.1}, {}, "--start-weight-decay needs"),
    (
        "weight_decay_grows",
        {"start_weight_decay": 0.2, "end_weight_decay": 0.1},
        {"start_weight_decay": 0.1, "end_weight_decay": 0.1},
        "0.2 is above --end-weight-decay 0.1",
    ),
    ("moments_range", {"adam_beta2": 1.0}, {"adam_beta2": 0.95}, "--adam-beta2 must lie in [0, 1)"),
    ("lr_needed", {"train_iters": 10}, ITERS, "--lr is missing"),
    ("lr_needed", {"train_samples": 10}, {"train_samples": 10, "skip_train": True}, "--lr is missing"),
    ("lr_order", {"lr": 1e-4, "min_lr": 1e-3}, {"lr": 1e-3, "min_lr": 1e-3}, "--min-lr 0.001 is above"),
    ("lr_order", {"lr": 1e-4, "lr_warmup_init": 1.0}, {"lr_warmup_init": 1.0}, "--lr-warmup-init 1"),
    (
        "warmup_once",
        {"lr_warmup_fraction": 0.1, "lr_warmup_iters": 1},
        {"lr_warmup_fraction": 0.1},
        "--lr-warmup-fraction and --lr-warmup-iters",
    ),
    ("warmup_share", {"lr_warmup_fraction": 1.0}, {"lr_warmup_fraction": 0.0}, "[0, 1), got 1"),
    ("one_unit", {**ITERS, "lr_decay_samples": 5}, {**ITERS, "lr_decay_iters": 5}, "use --lr-decay-iters"),
    ("one_unit", {**SAMPLES, "lr_warmup_iters": 5}, {**SAMPLES, "lr_warmup_samples": 5}, "--train-samples"),
    ("warmup_fits", {**ITERS, "lr_warmup_iters": 10}, {**ITERS, "lr_warmup_iters": 9}, "10 must be below"),
    ("warmup_fits", {**WSD, "lr_warmup_iters": 7}, {**WSD, "lr_warmup_iters": 6}, "does not fit after 7 iters"),
    ("wsd_length", {**ITERS, "lr_decay_style": "WSD"}, WSD, "give --lr-wsd-decay-iters"),
    ("wsd_length", {**WSD, "lr_decay_style": "cosine"}, WSD, "belongs to --lr-decay-style WSD"),
    (
        "one_resume_rule",
        {"override_opt_param_scheduler": True, "use_checkpoint_opt_param_scheduler": True},
        {"override_opt_param_scheduler": True},
        "exclude each other",
    ),
    ("one_precision", {"fp16": True, "bf16": True}, {"bf16": True}, "--fp16 and --bf16 exclude each other"),
    ("one_precision", {"fp8": "hybrid"}, {"fp8": "hybrid", "bf16": True}, "add --bf16"),
    (
        "split_backward_is_eager",
        {**PP2, SCHEDULE: "zb-h1", "fp8": "e4m3", "bf16": True},
        {**PP2, "fp8": "e4m3", "bf16": True},
        "fp8 layers don't split backward",
    ),
    ("loss_scale_use", {"loss_scale": 8.0}, {"loss_scale": 8.0, "fp16": True}, "is for --fp16"),
    ("loss_scale_use", {"initial_loss_scale": 0.5}, {"initial_loss_scale": 1.0}, "--min-loss-scale 1 is above"),
    (
        "load_needed",
        {"use_checkpoint_args": True},
        {"use_checkpoint_args": True, "load": "d"},
        "--use-checkpoint-args needs a checkpoint",
    ),
    ("load_needed", {"load_iteration": 3}, {"load_iteration": 3, "load": "d"}, "--load-iteration 3 needs"),
    ("save_format", {"ckpt_format": "megatron", "save": "d"}, {"ckpt_format": "megatron"}, "use native"),
]


def config_of(settings: dict) -> RunConfig:
    return build({**SIZES, **settings}, RunConfig())


@pytest.mark.parametrize(("rule", "breaks", "keeps", "words"), CASES)
def test_rule(rule: str, breaks: dict, keeps: dict, words: str) -> None:
    faults = list(RULES[rule](config_of(breaks)))
    assert any(words in fault for fault in faults), faults
    assert list(RULES[rule](config_of(keeps))) == []
    assert set(faults) <= set(broken(config_of(breaks)))


def test_every_rule_is_tried() -> None:
    assert {rule for rule, *_ in CASES} == set(RULES)


def test_every_complaint_names_a_flag() -> None:
    for rule, breaks, _, _ in CASES:
        assert all("--" in fault for fault in RULES[rule](config_of(breaks))), rule


@pytest.mark.parametrize("name", [*AT_LEAST_ONE, *ABOVE_ZERO, *NOT_NEGATIVE])
def test_range(name: str) -> None:
    flag = by_name()[name]
    least = 0 if name in NOT_NEGATIVE else 1
    wrong = -1 if name in NOT_NEGATIVE else 0
    words = "must not be negative" if name in NOT_NEGATIVE else "must be a"
    complaint = f"{flag.flag} {words}"
    assert any(fault.startswith(complaint) for fault in broken(config_of({name: flag.kind(wrong)})))
    assert not any(fault.startswith(complaint) for fault in broken(config_of({name: flag.kind(least)})))


def test_every_number_has_a_range_or_a_rule() -> None:
    own_rule = {"dropout_range": ("attention_dropout", "hidden_dropout"), "rotary_share": ("rotary_percent",)}
    own_rule |= {"moments_range": ("adam_beta1", "adam_beta2", "sgd_momentum")}
    own_rule |= {"warmup_share": ("lr_warmup_fraction",), "rampup_numbers": ("rampup_batch_size",)}
    own_rule |= {"seed_range": ("seed",)}
    own_rule |= {"exits_in_range": ("exit_layer_nums",), "temperatures_positive": ("exit_layer_temperature",)}
    own_rule |= {"weights_not_negative": ("exit_layer_weight", "exit_layer_weight_init")}
    covered = {*AT_LEAST_ONE, *ABOVE_ZERO, *NOT_NEGATIVE, *(name for names in own_rule.values() for name in names)}
    assert set(own_rule) <= set(RULES)
    assert covered == {flag.name for flag in all_flags() if flag.kind in (int, float)}


def test_choices_of_a_config_made_in_python() -> None:
    assert any("'lion' is not one of adam, sgd" in fault for fault in broken(config_of({"optimizer": "lion"})))


@pytest.mark.parametrize(
    "flag", ["save", "load", "metrics_file", "tensorboard_dir", "data_cache_path", "vocab_file", "tokenizer_model"]
)
def test_paths_are_not_empty(flag: str) -> None:
    (fault,) = broken(config_of({flag: ""}))
    assert fault == f"--{flag.replace('_', '-')} is empty: give a path, or leave the flag out"


def test_a_size_missing_from_the_checkpoint_is_not_sought_there_again() -> None:
    (fault,) = broken(config_of({"seq_length": None, "load": "d", "use_checkpoint_args": True}))
    assert fault == "--seq-length is missing: give it"


def test_all_faults_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        check(config_of({"hidden_size": 30, "fp16": True, "bf16": True, "exit_layer_nums": (9,)}), where="here")
    assert str(error.value).startswith("here: 3 settings need mending:")


def test_shape_can_wait() -> None:
    config = build({"use_checkpoint_args": True, "load": "d", "exit_layer_weight": (1.0,)}, RunConfig())
    check(config, shape=False)
    with pytest.raises(ConfigError):
        check(config)


def test_only_shape_is_asked_of_a_stored_config() -> None:
    config = config_of({"tensor_model_parallel_size": 8, "log_interval": 0})
    check(config, run=False)
    with pytest.raises(ConfigError, match="2 settings"):
        check(config)


def test_training_needs() -> None:
    with pytest.raises(ConfigError) as error:
        check_training(config_of({}))
    for flag in ("--train-iters", "--data-path", "--tokenizer-type"):
        assert flag in str(error.value)
    check_training(config_of({**ITERS, "data_path": ("a",), "tokenizer_type": "NullTokenizer"}))
    check_training(config_of({"skip_train": True, "valid_data_path": ("a",), "load": "d"}))


@pytest.mark.parametrize(
    ("idle", "active", "said"),
    [
        ({"sequence_parallel": True}, None, "with one tensor-parallel rank: --sequence-parallel"),
        ({"save_interval": 5}, {"save": "d"}, "without --save: --save-interval"),
        ({"keep_last_n_checkpoints": 5}, {"save": "d"}, "--keep-last-n-checkpoints"),
        ({"finetune": True, "load_optim": False}, {"load": "d"}, "without --load: --no-load-optim, --finetune"),
        ({"exit_layer_weight_init": (1.0,)}, {"exit_layer_weight_warmup_iters": 2}, "--exit-layer-weight-init"),
        ({"rotary_base": 500.0}, ROPE, "--rotary-base"),
        ({"rope_scaling_factor": 4.0}, {"use_rope_scaling": True, **ROPE}, "--rope-scaling-factor"),
        ({"adam_beta2": 0.5, "optimizer": "sgd"}, {"optimizer": "adam"}, "with --optimizer sgd: --adam-beta2"),
        ({"sgd_momentum": 0.5}, {"optimizer": "sgd"}, "--sgd-momentum"),
        ({"lr_wsd_decay_style": "linear"}, WSD, "--lr-wsd-decay-style"),
        ({"lr_warmup_init": 0.5}, {"lr_warmup_fraction": 0.1}, "without a warm-up: --lr-warmup-init"),
        ({"hysteresis": 3}, {"fp16": True}, "without --fp16: --hysteresis"),
        ({"wandb_group": "g"}, {"wandb_project": "p"}, "--wandb-group"),
        ({"vocab_file": "v", "tokenizer_type": "HuggingFaceTokenizer"}, {"tokenizer_type": "GPT2BPETokenizer"},
         "with this --tokenizer-type: --vocab-file"),
        ({"vocab_size": 9, "tokenizer_type": "HuggingFaceTokenizer"}, {"tokenizer_type": "NullTokenizer"},
         "with this --tokenizer-type: --vocab-size"),
        ({"tokenizer_model": "m", "tokenizer_type": "NullTokenizer"}, {"tokenizer_type": "HuggingFaceTokenizer"},
         "with this --tokenizer-type: --tokenizer-model"),
    ],
)  # fmt: skip
def test_settings_without_effect_are_said(idle: dict, active: dict | None, said: str) -> None:
    (line,) = without_effect(config_of(idle))
    assert line.startswith("without effect ") and said in line
    if active is not None:
        assert list(without_effect(config_of(idle | active))) == []
