"""What `derta COMMAND --help` says. A test holds every key named here against its dataclass."""

from __future__ import annotations

SUMMARY = {
    "train": "tune a model on triples and dialogues",
    "eval": "attack success, over-refusal and refusal curves of a model",
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
  --method           full | lora
  --lora_r --lora_alpha --lora_dropout --lora_target_modules
  --dtype            auto | float32 | bfloat16
  --chat_template    Jinja text or a file, where the tokenizer has none
  --head_impl --attention_impl

Every field of transformers' TrainingArguments is a key too: --learning_rate, --num_train_epochs,
--lr_scheduler_type, --warmup_steps, --gradient_checkpointing, ...; --resume_from_checkpoint alone
goes on from the latest one in output_dir.
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
