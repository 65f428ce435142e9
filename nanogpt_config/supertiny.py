"""Overrides of nanoGPT's train.py for the very small transformer: 6 layers, width 16, 8 heads.

The architecture is that of the 2023 replication (supertiny_2023.py), the training is what the
arithmetic asks for. From nanoGPT's folder, on the data of prepare.py:
    python train.py HERE/nanogpt_config/supertiny.py --dataset=DATA --out_dir=OUT
    torchrun --standalone --nproc_per_node=4 train.py ... the same ...

Cost, by arithmetic, not measured: the logits decide. Each of the 50,304 of a token is written, read
and differentiated in bfloat16 and float32: some 25 bytes, 1.3 MB a token, 1.3 PB for 1.05 billion
tokens. At 0.94 TB/s (RTX 3090) that is 25 minutes, at 4.8 TB/s (H200) 5; starting the kernels of
64,000 passes at some 5 ms each adds 5. Allow an hour on a 3090, a quarter of one on an H200.
Memory, of logits too: 64 * 256 * 50,304 * (2 + 4 + 4 + 2 bytes) = 10 GB. On a card of 8 GB:
    --batch_size=16 --gradient_accumulation_steps=32     2.5 GB, the same 131,072 tokens a step
"""

import time

# data: nanoGPT looks in data/<dataset>; --dataset=/an/absolute/path goes anywhere
dataset = "openwebtext-gpt2"
out_dir = "out-supertiny"

# model: 50,304 * 16 token embeddings + 256 * 16 positions + 6 * 12 * 16**2 + 13 * 16 of norms =
# 804,864 + 4,096 + 18,432 + 208 = 827,600 weights, of which 18,640 do the thinking
n_layer = 6
n_head = 8  # of width 2
n_embd = 16  # MLP width 4 * 16 = 64
block_size = 256
dropout = 0.0  # one pass over a billion tokens can't be learnt by heart; it only slows
bias = False

# batches: 8 * 64 * 256 = 131,072 tokens a step; 8,000 steps = 1.05 billion tokens, 63 times the 20
# per weight that are said to suffice (Hoffmann et al. 2022), and 2.1 epochs of 500M
batch_size = 64
gradient_accumulation_steps = 8  # divisible by 1, 2, 4 and 8 GPUs, as nanoGPT asserts
max_iters = 8000
lr_decay_iters = 8000  # = max_iters, so that the learning rate does decay

# AdamW
learning_rate = 1e-2  # nanoGPT's 6e-4 at width 768 grows as 1/width to 3e-2; see LOG.md
min_lr = 1e-3  # learning_rate / 10, as nanoGPT has it
warmup_iters = 200  # 1/40 of the steps
beta2 = 0.99  # as nanoGPT's small config (train_shakespeare_char)

# evaluation: 50 * 64 * 256 = 819,200 tokens of either bin; a checkpoint each time
eval_interval = 500
eval_iters = 50
log_interval = 50
always_save_checkpoint = True  # a killed run goes on from the last with --init_from=resume

# W&B only on request: --wandb_log=True
wandb_log = False
wandb_project = "sparsecode"
wandb_run_name = "supertiny-" + str(time.time())
