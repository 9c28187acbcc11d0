"""Whose published ideas a run uses, by its settings: `attribution` of submission.json, as in records of the contest.

The pull requests are those that train_gpt.py names where it uses them; the people, where a record's files tell them.
"""

# name: (settings that must be there, each with the values that switch it off; whose it is)
CREDITS = {
    "leaky_relu_squared": (dict(ACTIVATION=("silu",), MLP_NEGATIVE_SLOPE=("0.0",)), "@abaybektursun (PR #549)"),
    "exclusive_self_attention": (dict(XSA_LAST_N=("0",)), "@unnir (PR #265)"),
    "partial_rope": (dict(ROPE_DIMS=("0",)), "@jfprincz (PR #315)"),
    "inputs_scaled_by_depth": (dict(LN_SCALE_POWER=("0.0",)), "@jfprincz (PR #315)"),
    "smear_gate": (dict(SMEAR_GATE=("0",)), "PR #65"),
    "bigram_hash": (dict(BIGRAM_VOCAB_SIZE=("0",)), "PR #65"),
    "shared_value_embedding": (dict(VE_LAYERS=("",)), "PR #374"),
    "gated_attention": (dict(GATED_ATTENTION=("0",)), "PR #490"),
    "attention_gate_of_few_channels": (dict(ATTN_GATE_DIMS=("0",)), "PR #1812"),
    "depth_recurrence": (dict(NUM_LOOPS=("0",)), "@bigbag (PR #1493)"),
    "decoder_learning_rate": (dict(DECODER_LR_MULT=("1.0",)), "PR #1127"),
    "muon_rows_normalized": (dict(MUON_ROW_NORMALIZE=("0",)), "@bigbag (PR #1493)"),
    "sharded_muon": ({}, "PR #399"),
    "clip_by_standard_deviations": (dict(MATRIX_CLIP_SIGMAS=("0.0",)), "@bigbag (PR #1493)"),
    "lora_ttt_of_each_document": (dict(TTT_EPOCHS=("0",), TTT_SCOPE=("stream",)), "@samacqua (PR #77)"),
    "score_first_ttt": (dict(TTT_EPOCHS=("0",)), "@abaybektursun (PR #549)"),
}


def attribution(settings: dict[str, str]) -> dict[str, str]:
    """The credits of these settings of train_gpt.py; a setting that a script does not have is off."""
    return {name: whose for name, (needs, whose) in CREDITS.items()
            if all(settings.get(setting, off[0]) not in off for setting, off in needs.items())}
