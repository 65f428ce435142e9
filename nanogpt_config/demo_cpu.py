"""Overrides of nanoGPT's train.py for the demo model of run.py: < 10 min on two CPU cores.

From nanoGPT's folder, on the data of prepare.py:
    OMP_NUM_THREADS=1 python train.py HERE/nanogpt_config/demo_cpu.py --dataset=DATA --out_dir=OUT
"""

# data: nanoGPT looks in data/<dataset>; --dataset=/an/absolute/path goes anywhere
dataset = "stdlib-bpe"
out_dir = "out-demo"

# model: 2 * 12 * 64**2 + 1024 * 64 + 128 * 64 = 172,032 weights, and 320 of the norms
n_layer = 2  # the fewest that compose attention heads; 4 learnt less in the same time
n_head = 2  # of width 32; many narrow heads are slow on a CPU (8 of width 2: 2.4 times)
n_embd = 64  # MLP width 4 * 64 = 256; of 16, 64, 96 and 128 the best for minutes of CPU
block_size = 128  # tokens, of 2.6 bytes: about ten lines of Python
dropout = 0.0  # the validation loss falls to the end; on a CPU dropout is 13 times slower
bias = False

# batches: 12 * 128 = 1,536 tokens a step; 9,000 steps = 13.8M tokens = 3.2 epochs of 4.4M
batch_size = 12
gradient_accumulation_steps = 1  # nanoGPT's 40 is for 124M weights
max_iters = 9000
lr_decay_iters = 9000  # = max_iters, so that the learning rate does decay

# AdamW
learning_rate = 6e-3  # nanoGPT's 6e-4 at width 768 grows as 1/width to 7e-3; 1e-2 was worse
min_lr = 3e-4  # learning_rate / 20
warmup_iters = 50
beta2 = 0.99  # few tokens a step: average the squares over more steps than at 0.95

# evaluation: 100 * 1,536 = 153,600 tokens of either bin
eval_interval = 1000
eval_iters = 100
log_interval = 500
always_save_checkpoint = False  # keep the one of the lowest validation loss

# machine
device = "cpu"
dtype = "float32"
compile = False  # it takes 31 s before the first step
wandb_log = False
