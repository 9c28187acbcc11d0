"""The settings of each row of VARIANTS, read from the pages about the published systems and not from the script.

One line an option, one column a row; `=` is the value of `card`, `()` an empty list. The last column is the source:
a section of components.md (`c5.5`), frontier.md (`f8`), logs/systems.md (`sys`), a PR, or `ours` for what we chose.
`frontier` is PR #2135 with the growing rows of PR #2014; `card` is PR #549 on PR #414 with changes of ours; `demo` is ours.
"""

TABLE = """
option                     card      pr150   pr455    pr490    pr1127  pr1812   frontier  demo   | source
seed                       1337      =       =        =        =       =        =         =      | c15; #1127 ran 1337 too

vocab_size                 1024      =       =        =        =       8192     8192      =      | c15
num_layers                 11        =       =        =        =       =        =         6      | c4.0
model_dim                  512       =       =        =        480     =        =         128    | c4.0
num_heads                  8         =       =        =        =       =        =         4      | c4.0
num_kv_heads               4         =       =        =        =       =        =         2      | c4.0; #1127 by its command
mlp_mult                   3.0       =       =        =        3.2     4.0      4.0       =      | c4.0, 1536 of 512 and of 480, 2048 of 512; f8
activation                 leaky_relu =      =        =        =       silu     =         =      | c4.13
mlp_negative_slope         0.5       0       0        =        0       =        =         =      | c4.13; pr1812 has no slope
mlp_affine                 0         =       =        =        1       =        =         =      | c4.13
rope_base                  10000     50000   22081.80 =        =       =        =         =      | c4.8, pr490 by 490s; f8
rope_dims                  16        0       =        =        =       =        =         =      | c4.8
qk_gain_init               1.5       =       =        =        =       5.25     5.0       =      | c15; f8
qk_gains                   1         =       =        =        =       2        =         =      | c4.7
document_attention         0         =       =        =        =       =        1         =      | c2.1; frontier ours
xsa_last_n                 4         0       =        =        =       11       11        =      | c4.9, pr490 by 490s; f8
value_residual             0         =       =        1        =       =        =         =      | c4.11
gated_attention            0         =       =        1        =       =        =         =      | c4.12
attn_gate_dims             0         =       =        =        =       12       12        =      | c4.12; f8
ln_scale_power             0.5       0       =        =        =       =        =         =      | c4.14, pr490 by 490s
parallel_residual_start    -1        =       =        =        =       7        8         =      | c15; f8
skip_gates                 0         =       =        =        1       1        1         =      | c4.15; f8
num_loops                  0         =       =        =        =       2        2         =      | c4.16; f8
loop_start                 3         =       =        =        =       =        =         =      | c4.16; f8
loop_end                   5         =       =        =        =       =        =         =      | c4.16; f8
enable_looping_at          0.35      =       =        =        =       =        =         =      | c4.16; f8
smear_gate                 1         =       =        =        =       0        =         =      | c4.0; f8
bigram_vocab_size          2048      =       =        4096     8192    0        0         16384  | c4.5
bigram_dim                 128       =       =        =        =       =        =         64     | c4.5
bigram_hash                reserved  xor     =        =        linear  =        =         =      | c4.5
bigram_scale_init          0.05      =       =        =        0       =        =         =      | c4.5: #1127 has no scale
ve_dim                     128       =       =        =        =       =        =         64     | c4.10
ve_layers                  9,10      ()      =        ()       ()      ()       ()        4,5    | c4.10
embed_scale                0         =       =        =        =       1        =         =      | c4.4
logit_softcap              30        =       =        =        =       =        =         =      | c15; f8
tied_embed_init_std        0.005     =       =        =        =       =        =         =      | c15; f8
init                       orthogonal =      =        =        default =        =         =      | c4.17

train_batch_tokens         786432    =       =        =        524288  =        =         2048   | c5.8; f8
train_seq_len              2048      =       =        =        =       =        3072      256    | c5.8; #2014
early_seq_lens             ()        =       =        =        =       =        1024,2048 =      | #2014
early_seq_ends             ()        =       =        =        =       =        0.1,0.7   =      | ours; f1 has the lengths alone
loader                     stream    =       =        =        =       shuffled shuffled  =      | c2.4, c2.6
micro_batch_tokens         98304     =       =        =        65536   =        =         2048   | c2.4
iterations                 20000     =       =        9000     =       50000    =         =      | c15
max_wallclock_seconds      600       =       =        =        =       =        =         120    | c15
warmup_steps               20        =       =        =        =       =        =         1      | c6; f8
warmdown_iters             3500      3000    3000     1200     =       0        0         0      | c5.5
warmdown_frac              0         =       =        =        =       0.72     0.85      0.8    | c5.5; f8
min_lr                     0         =       =        =        =       =        0.1       =      | c15; f8
matrix_lr                  0.025     =       =        =        =       0.022    0.028     0.02   | c16.1; f8
scalar_lr                  0.025     =       =        =        =       0.02     0.02      0.015  | c5.4; f8
tied_embed_lr              0.035     =       =        =        =       0.03     0.03      0.03   | c5.4; f8
decoder_lr_mult            1         =       =        =        2       =        =         =      | c5.2
muon_momentum              0.99      =       =        0.95     =       =        0.97      0.95   | c5.6; f8
muon_momentum_warmup_start 0.92      =       =        0.85     =       =        =         0.85   | c5.6; f8
muon_momentum_warmup_steps 1500      =       =        500      =       0        =         100    | c5.6; f8
muon_momentum_warmup_frac  0         =       =        =        =       0.22     =         =      | c5.6
muon_momentum_cooldown     1         =       =        =        =       0.25     =         =      | c5.6
muon_backend_steps         5         =       =        =        =       =        =         =      | c5.1; f8
muon_row_normalize         0         =       =        =        =       1        1         =      | c5.2; f8
muon_wd                    0.04      =       =        =        =       0.095    0.095     =      | c5.2; f8
muon_wd_mlp                -1        =       =        =        =       0.115    =         =      | c5.2
embed_wd                   0.04      0       =        =        =       0.085    0.085     =      | c5.4; f8
adam_wd                    0         =       0.04     0.04     0.04    0.005    0.02      =      | c5.4; card and demo ours (#549: 0.04); f8
beta1                      0.9       =       =        =        =       =        =         =      | c5.4; f8
beta2                      0.95      =       =        =        =       =        0.99      =      | c5.4; f8
adam_eps                   1e-8      =       =        =        =       =        =         =      | c5.4; f8
grad_clip_norm             0.3       =       =        =        0       =        =         =      | c5.7; f8
averaging                  ema       swa     swa      =        =       =        =         =      | c7
ema_decay                  0.997     =       =        =        0.9985  0.9965   0.9965    0.9    | c7; f8
swa_every                  50        200     =        =        =       =        =         =      | c7: 150a, 455
swa_start_scale            0.2       0.5     =        =        =       =        =         =      | c7: 150a, 455
late_qat_threshold         0.15      2       0.1      =        =       0        0         =      | c8: 2 is from step 0; pr490 by 490s
checkpoint_every           0         =       =        =        =       =        =         =      | ours
train_log_every            500       =       =        =        =       =        =         20     | ours
val_loss_every             0         =       =        =        =       =        =         =      | c16.1: all logs of #150; others ours

matrix_bits                6         =       =        =        =       =        8         =      | c9.3; frontier ours, under a mean scale
embed_bits                 8         16      =        16       16      =        =         =      | c9.3, pr490 by 490s; frontier ours (#2135: 7)
table_bits                 0         6       =        8        6       =        =         =      | c9.3
clip_shares                1,0.95,0.9,0.85,0.8,0.7 1 1 1      =       =        =         =      | c9.2: row maximum; card and pr1127 ours
min_clip                 1         =       =        =        =       =        =         0      | c9.2
matrix_clip_sigmas         0         =       =        =        =       13.3     =         =      | sys: 12.85 as published
embed_clip_sigmas          0         =       =        =        =       20       =         =      | c9.3
quantizer                  rtn       =       =        gptq     =       gptq     gptq      =      | c9.4, c9.5; f8
mean_scale                  0         =       =        =        =       =        0.1       =      | ours
scale_power                 0.75      =       =        =        =       =        =         =      | ours
gptq_calibration_batches   8         =       =        =        =       64       =         =      | c9.4, c9.5; frontier ours (#2135: 32)
gptq_reserve_seconds       4         =       =        =        =       12       =         =      | c9.5: #1493's 12; others ours
gptq_damping               0.01      =       =        =        =       =        =         =      | c9.4, c9.5
prune_share                0         =       =        0.02     =       =        =         =      | c9.4
fit                        1         =       =        =        =       =        =         0      | sys
compressor                 zstd      =       =        =        =       brotli   rans      =      | c10; frontier ours
zstd_level                 22        =       =        =        =       =        =         =      | c10

eval_seq_len               0         =       =        =        =       =        =         =      | c11.2: the training length
eval_stride                64        =       =        =        =       =        1024      128    | c11.2; frontier ours
ttt_epochs                 1         3       3        3        =       4        =         =      | c12; card by T6
ttt_scope                  document  stream  stream   stream   stream  stream   =         =      | c12, score first
ttt_chunk_tokens           64        32768   32768    131072   32768   65536   48       128     | c12: T4, T5; the first two as #549; card and demo ours
ttt_lora_rank              80        0       0        0        8       0       =        8       | f8; pr1127 by its title; demo ours
ttt_lora_scale             1.8       1       1        1        1       1       =        1       | f8: alpha 144; c12: T6, no alpha
ttt_optimizer              adamw     sgd     sgd      =        =       sgd      =         =      | c12
ttt_lr                     0.0002    0.002   0.002    1e-4     0.01    0.005   =        0.02    | c12; card and demo ours
ttt_expert_lrs             0         ()      ()       ()       ()      ()      =        ()      | ours, no published entry has it
ttt_share                  0.05      =       =        =        =       =       =        =       | ours
ttt_cosine_floor           1         =       =        0.1      =       0        =         =      | c12: T1 constant, T4, T5
ttt_cosine_tokens          0         =       =        62021632 =       40540160 =         =      | c0, sys
ttt_momentum               0         0.9     0.9      0.9      0.9     0.9     =        0.9     | c12; f8
ttt_nesterov               0         =       =        =        =       1        =         =      | c12: T5
ttt_beta2                  0.99      0.999   0.999    0.999    0.95    0.999   =        0.95    | c12: T4, T6; f8; SGD has none
ttt_weight_decay           0.5       0       0        0        0       0       =        0       | c12; 0.5: #1855
ttt_z_loss                 0         =       =        =        =       1e-5     =         =      | c12: T5
ttt_temperature            1         =       =        0.98     =       =        =         =      | c9.6
ttt_batch_seqs             64        32      32       =        32      32       =         =      | c12; pr1127 ours
ttt_grad_clip              0         1       1        1        1       1        =         =      | c12
"""

ALL_BUT_TWO_BLOCKS = "*,!blocks.0.*,!blocks.1.*"
QUERY_VALUE_HEAD = "*.c_q.weight,*.c_v.weight,tok_emb.weight"
ALL_BUT_KEYS = "blocks.*.weight,!*.c_k.weight,tok_emb.weight"
TTT_PARAMS = dict(
    card=ALL_BUT_KEYS,  # f8
    pr150=ALL_BUT_TWO_BLOCKS,  # c12, T1: TTT_FREEZE_BLOCKS=2
    pr455=ALL_BUT_TWO_BLOCKS,
    pr490="blocks.9.*,blocks.10.*,*.attn_scale,*.mlp_scale,bigram.scale,tok_emb.*",  # c12, T4
    pr1127=QUERY_VALUE_HEAD,  # T6, for the LoRA of its title
    pr1812="*.weight",  # c12, T5: parameters of 10,000 elements or more
    frontier=ALL_BUT_KEYS,  # f8: Q, V, O, MLP and head
    demo=QUERY_VALUE_HEAD,
)


def published() -> dict:
    """The text of each option by row, {row: {option: text}}."""
    lines = [line.split("|")[0].split() for line in TABLE.splitlines() if line]
    (_, *rows), options = lines[0], lines[1:]
    assert all(len(line) == len(rows) + 1 for line in options), [line[0] for line in options if len(line) != len(rows) + 1]
    settings = {row: {} for row in rows}
    for option, card, *others in options:
        for row, text in zip(rows, (card, *others)):
            settings[row][option] = card if text == "=" else text
    for row, text in TTT_PARAMS.items():
        settings[row]["ttt_params"] = text
    return settings
