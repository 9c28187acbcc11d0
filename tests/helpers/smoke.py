"""Settings of the smallest run, for tests: every mechanism of `card` in seconds on a CPU."""

SMOKE = dict(
    pair.split("=", 1)
    for pair in """
    DTYPE=fp32 NUM_LAYERS=4 MODEL_DIM=32
    NUM_HEADS=4 NUM_KV_HEADS=2 ROPE_DIMS=4 XSA_LAST_N=2 VE_LAYERS=2,3 BIGRAM_VOCAB_SIZE=64 BIGRAM_DIM=8 VE_DIM=8
    TRAIN_SEQ_LEN=32 TRAIN_BATCH_TOKENS=256 MICRO_BATCH_TOKENS=128 ITERATIONS=20 MAX_WALLCLOCK_SECONDS=60 WARMUP_STEPS=1
    WARMDOWN_ITERS=10 MUON_MOMENTUM_WARMUP_STEPS=10 EMA_DECAY=0.8 TRAIN_LOG_EVERY=5 VAL_LOSS_EVERY=10 MIN_CLIP=0 FIT=0
    EVAL_STRIDE=8 TTT_EPOCHS=3 TTT_PARAMS=* TTT_SCOPE=stream TTT_CHUNK_TOKENS=256 TTT_LORA_RANK=0 TTT_OPTIMIZER=sgd
    TTT_LR=0.02 TTT_EXPERT_LRS= TTT_MOMENTUM=0.9 TTT_BETA2=0.999 TTT_WEIGHT_DECAY=0 TTT_LORA_SCALE=1 TTT_BATCH_SEQS=32 TTT_GRAD_CLIP=1
    """.split()
)


def for_evaluation(env: dict[str, str]) -> dict[str, str]:
    """`env` without the settings of SMOKE, which an artifact stores, or which have no effect on an evaluation."""
    return dict(env.items() - SMOKE.items())
