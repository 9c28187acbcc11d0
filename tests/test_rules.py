"""Each rule for combinations of options: the last values that it allows and the first that it refuses."""

import pytest

import train_gpt as t

# (options of both runs, options that are allowed, options that are refused); the message names the first refused option
STREAM = dict(TTT_SCOPE="stream", TTT_CHUNK_TOKENS="2048", TTT_LORA_RANK="0", TTT_LORA_SCALE="1", TTT_EXPERT_LRS="", TTT_PARAMS="*")
CASES = [
    ({}, dict(NUM_HEADS="4"), dict(MODEL_DIM="516")),
    ({}, dict(NUM_KV_HEADS="8"), dict(NUM_KV_HEADS="3")),
    (dict(NUM_HEADS="4", NUM_KV_HEADS="4", ROPE_DIMS="0"), dict(MODEL_DIM="8"), dict(MODEL_DIM="12")),
    ({}, dict(ROPE_DIMS="64"), dict(ROPE_DIMS="66")),
    ({}, dict(ROPE_DIMS="2"), dict(ROPE_DIMS="3")),
    (dict(QK_GAINS="2"), dict(ROPE_DIMS="62"), dict(ROPE_DIMS="64")),
    (dict(ROPE_DIMS="0"), dict(QK_GAINS="1"), dict(QK_GAINS="2")),
    ({}, dict(ATTN_GATE_DIMS="512"), dict(ATTN_GATE_DIMS="513")),
    (dict(ATTN_GATE_DIMS="12"), dict(GATED_ATTENTION="0"), dict(GATED_ATTENTION="1")),
    ({}, dict(VE_LAYERS="0,10"), dict(VE_LAYERS="0,11")),
    ({}, dict(XSA_LAST_N="11"), dict(XSA_LAST_N="12")),
    (dict(NUM_LOOPS="1"), dict(LOOP_END="10"), dict(LOOP_END="11")),
    (dict(NUM_LOOPS="1", LOOP_END="5"), dict(LOOP_START="5"), dict(LOOP_START="6")),
    ({}, dict(BIGRAM_VOCAB_SIZE="2"), dict(BIGRAM_VOCAB_SIZE="1")),
    (dict(MODEL_DIM="65536", NUM_HEADS="512", NUM_KV_HEADS="1", TRAIN_BATCH_TOKENS="1048576", MICRO_BATCH_TOKENS="1048576", EVAL_SEQ_LEN="2048",
          EVAL_BATCH_SEQS="1", TTT_BATCH_SEQS="1"),
     dict(TRAIN_SEQ_LEN="131072"), dict(TRAIN_SEQ_LEN="262144")),
    ({}, dict(EMBED_BITS="8"), dict(EMBED_BITS="9")),
    ({}, dict(EMBED_BITS="16"), dict(EMBED_BITS="15")),
    ({}, dict(TABLE_BITS="2"), dict(TABLE_BITS="1")),
    ({}, dict(TABLE_BITS="8"), dict(TABLE_BITS="9")),
    ({}, dict(CLIP_SHARES="1,0.01"), dict(CLIP_SHARES="1,0")),
    ({}, dict(CLIP_SHARES="1"), dict(CLIP_SHARES="")),
    ({}, dict(CLIP_SHARES="1"), dict(CLIP_SHARES="1.01")),
    (dict(MATRIX_BITS="8", QUANTIZER="gptq"), dict(MEAN_SCALE="0.1"), dict(MEAN_SCALE="0.1", MATRIX_BITS="6")),
    (dict(MATRIX_BITS="8"), dict(QUANTIZER="gptq"), dict(MEAN_SCALE="0.1")),
    (dict(WARMDOWN_FRAC="0.5"), dict(WARMDOWN_ITERS="0"), dict(WARMDOWN_ITERS="1")),
    (dict(MUON_MOMENTUM_WARMUP_FRAC="0.5"), dict(MUON_MOMENTUM_WARMUP_STEPS="0"), dict(MUON_MOMENTUM_WARMUP_STEPS="1")),
    ({}, dict(TRAIN_BATCH_TOKENS="4096"), dict(TRAIN_BATCH_TOKENS="4097")),
    ({}, dict(MICRO_BATCH_TOKENS="2048"), dict(MICRO_BATCH_TOKENS="2047")),
    (dict(EARLY_SEQ_ENDS="0.5"), dict(EARLY_SEQ_LENS="2048"), dict(EARLY_SEQ_LENS="4096")),
    (dict(EARLY_SEQ_ENDS="0.5"), dict(EARLY_SEQ_LENS="1024"), dict(EARLY_SEQ_LENS="1000")),
    (dict(EARLY_SEQ_LENS="512,1024"), dict(EARLY_SEQ_ENDS="0.1,0.2"), dict(EARLY_SEQ_ENDS="0.2,0.1")),
    (dict(EARLY_SEQ_LENS="512,1024"), dict(EARLY_SEQ_ENDS="0.1,0.2"), dict(EARLY_SEQ_ENDS="0.2,0.2")),
    (dict(EARLY_SEQ_LENS="512,1024"), dict(EARLY_SEQ_ENDS="0.1,0.2"), dict(EARLY_SEQ_ENDS="0.2")),
    (dict(LATE_QAT_THRESHOLD="0.15"), dict(MIN_LR="0.1"), dict(MIN_LR="0.15")),
    (dict(AVERAGING="swa", LATE_QAT_THRESHOLD="0"), dict(MIN_LR="0.1"), dict(MIN_LR="0.2")),
    (dict(QUANTIZER="gptq"), dict(GPTQ_RESERVE_SECONDS="599"), dict(GPTQ_RESERVE_SECONDS="600")),
    ({}, dict(GPTQ_RESERVE_SECONDS="600"), dict(RUN_ID="a/b")),
    (dict(RUN_ID="a"), dict(RESUME="1"), dict(RESUME="1", EVAL_ONLY="1")),
    ({}, dict(EVAL_STRIDE="1024"), dict(EVAL_STRIDE="1000")),
    ({}, dict(EVAL_STRIDE="2048"), dict(EVAL_STRIDE="4096")),
    (STREAM, {}, dict(TTT_CHUNK_TOKENS="2049")),
    ({}, dict(TTT_CHUNK_TOKENS="2048"), dict(TTT_CHUNK_TOKENS="4096")),
    (dict(TTT_EPOCHS="0"), dict(TTT_CHUNK_TOKENS="4096"), dict(EVAL_STRIDE="3")),
    ({}, dict(TTT_LORA_RANK="1"), dict(TTT_LORA_RANK="0")),
    (dict(TTT_EXPERT_LRS="0"), dict(TTT_LORA_RANK="128"), dict(TTT_LORA_RANK="129")),
    ({}, dict(TTT_CHUNK_TOKENS="8"), dict(TTT_CHUNK_TOKENS="7")),
    ({}, dict(EVAL_BATCH_SEQS="128"), dict(EVAL_BATCH_SEQS="129")),
    (dict(TTT_LORA_RANK="64"), dict(TTT_BATCH_SEQS="128"), dict(TTT_BATCH_SEQS="129")),
    (dict(TTT_EPOCHS="0"), dict(VOCAB_SIZE="16384"), dict(EVAL_BATCH_SEQS="32", VOCAB_SIZE="16385")),
    (dict(TTT_EPOCHS="0", EVAL_BATCH_SEQS="2", EVAL_STRIDE="64"), dict(EVAL_SEQ_LEN="16384", DOCUMENT_ATTENTION="1"),
     dict(DOCUMENT_ATTENTION="1", EVAL_SEQ_LEN="16448")),
    ({}, dict(TTT_COSINE_FLOOR="1"), dict(TTT_COSINE_FLOOR="0.9")),
    (STREAM, {}, dict(TTT_LORA_SCALE="2")),
    (STREAM, {}, dict(TTT_EXPERT_LRS="0")),
    ({}, dict(TTT_GRAD_CLIP="0"), dict(TTT_GRAD_CLIP="1")),
    (STREAM, dict(TTT_NESTEROV="1", TTT_OPTIMIZER="sgd", TTT_MOMENTUM="0.9"), dict(TTT_NESTEROV="1", TTT_OPTIMIZER="adamw")),
    (STREAM, dict(TTT_NESTEROV="1", TTT_OPTIMIZER="sgd", TTT_MOMENTUM="0.1"), dict(TTT_NESTEROV="1", TTT_OPTIMIZER="sgd", TTT_MOMENTUM="0")),
]


@pytest.mark.parametrize("both, allowed, refused", CASES, ids=lambda given: ",".join(f"{k}={v}" for k, v in given.items()))
def test_a_rule_allows_its_last_value_and_refuses_the_next_by_name(both, allowed, refused):
    t.Config.from_env(both | allowed)
    with pytest.raises(t.InputError, match=next(iter(refused))):
        t.Config.from_env(both | refused)


def test_every_rule_is_refused_by_a_case():
    """A rule that is added without a case fails here."""
    cfg, messages = t.Config(), []
    for both, _, refused in CASES:
        with pytest.raises(t.InputError) as caught:
            t.Config.from_env(both | refused)
        messages.append(str(caught.value))
    for rule in t.model_rules(cfg) | t.training_rules(cfg) | t.evaluation_rules(cfg) | t.memory_rules(cfg):
        assert any(message.startswith(f"{rule} (") for message in messages), rule
