"""What `derta COMMAND --help` says. A test holds every key named here against its dataclass."""

from __future__ import annotations

SUMMARY = {
    "train": "tune a model on triples and dialogues",
    "plan": "what a training step takes of a GPU, and the longest pack that fits",
    "eval": "attack success, over-refusal and refusal curves of a model",
    "merge": "fold adapters into the model that they were trained on",
    "chat": "ask a model, and see where it refuses",
    "demo": "train and compare four small models on a harmless world",
    "bench": "what the kernels take of every GPU, compiled here",
    "doctor": "what this machine has, and which path each op takes and why",
}

USAGE = {
    "train": """\
usage: derta train [CONFIG.yaml] [--key value ...]

  --model            model folder, or a name on the model hub
  --train_files      records to train on: JSON or JSONL, a.jsonl or [a.jsonl, b.jsonl]
  --eval_files       records whose loss is reported while training
  --output_dir       where checkpoints and the tuned model go
  --dry_run          show one pack and what its rows learn, train nothing
objective
  --refusal          refusal token: a word, a token id, or auto
  --branches         safe responses per triple and epoch, each after its own harmful prefix
  --cuts             zero | uniform | official | deep
  --rto_keep         share of harmful positions that are RTO targets, 0 to 1
  --rto_weight       weight of RTO in the loss
  --loss_norm        tokens | official | terms
batches
  --max_length       longest sequence in tokens
  --max_tokens       longest pack in tokens: what bounds memory
  --examples_per_step
model
  --method           full | lora | qlora
  --lora_r --lora_alpha --lora_dropout --lora_target_modules --lora_modules_to_save --lora_dora
  --dtype            auto | float32 | bfloat16
  --chat_template    Jinja text or a file, where the tokenizer has none
  --head_impl --attention_impl
memory, see derta plan
  --mlp_tile         run the MLPs by tiles of so many tokens
  --offload_checkpoints   keep what layers remember on the host
  --probe            first run the largest pack of all, then train

Every field of transformers' TrainingArguments is a key too: --learning_rate, --num_train_epochs,
--lr_scheduler_type, --warmup_steps, --gradient_checkpointing, ...; --resume_from_checkpoint alone
goes on from the latest one in output_dir.
""",
    "plan": """\
usage: derta plan [CONFIG.yaml] [--key value ...]

  --model            model folder, its config.json, or a name on the model hub; no weights are read
  --gpu              memory of the GPU in GiB: 24
  --max_tokens       longest pack in tokens
  --branches --rto_keep --prompt_tokens --safe_tokens     what packs are made of
  --probe            then run such a pack, with random weights

As in training: --method, --lora_r, --lora_alpha, --lora_dropout, --lora_target_modules,
--lora_modules_to_save, --lora_dora, --dtype, --bf16, --optim, --gradient_checkpointing,
--offload_checkpoints, --mlp_tile. A training run's CONFIG.yaml will do.
""",
    "eval": """\
usage: derta eval [CONFIG.yaml] [--key value ...]

  --model            folder of a model or of adapters; several: '{before: a, after: b}'
  --output_dir       where report.html, summary.json and the pictures go
records, each a JSON or JSONL file; scenarios without records are left out
  --harmful          triples: requests to refuse, and responses that attacks prefill
  --benign           dialogues whose requests are harmless: over-refusal
  --helpful          dialogues whose last answers are the right ones
  --helpful_metric   exact_match | perplexity
attacks
  --prefill_depths   tokens of a harmful response that an attacker writes: [0, 4, 16]
  --max_new_tokens   longest answer
  --keywords         what the judge takes for a refusal: [sorry, I cannot]
  --samples          answers shown in the report for each scenario; none by default
refusal curve
  --curve            true | false
  --refusal          refusal token, as in training
machine
  --batch_size --max_tokens --device --dtype --chat_template
""",
    "merge": """\
usage: derta merge ADAPTERS --output_dir FOLDER

  --model            folder of the adapters; the first argument
  --output_dir       where the whole model goes, in safetensors
  --dtype            float32 | bfloat16
""",
    "chat": """\
usage: derta chat MODEL [--key value ...]

  A line is a message, /new begins a new conversation. Answers are the likeliest ones.

  --model            folder of a model or of adapters; the first argument
  --prefill          what every answer begins with, as an attacker would write it
  --max_new_tokens   longest answer
  --device --dtype --chat_template
""",
    "demo": """\
usage: derta demo [--key value ...]

  --seeds            worlds and trainings to average over
  --output_dir       where report.html, summary.json and the pictures go
""",
    "bench": """\
usage: derta bench resources [--key value ...]

  resources: registers, local and shared memory of every Triton launch, compiled ahead of time; an
  error if one does not fit its GPU. Needs no GPU.

  --capabilities     of the GPUs to compile for, 90 for 9.0: [80, 86, 89, 90, 100, 120]
""",
    "doctor": """\
usage: derta doctor
""",
}
