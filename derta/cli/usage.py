"""What `derta COMMAND --help` says. A test holds every key named here against its dataclass."""

from __future__ import annotations

SUMMARY = {
    "train": "tune a model on triples and dialogues",
    "plan": "what a training step takes of a GPU, and the longest pack that fits",
    "eval": "attack success, over-refusal and refusal curves of a model",
    "merge": "fold adapters into the model that they were trained on",
    "chat": "ask a model, and see where it refuses",
    "demo": "train and compare small models on a harmless world",
    "bench": "what the kernels take of every GPU, compiled here",
    "doctor": "what this machine has, and which path each op takes and why",
    "data": "what is in record files, and what is amiss with them",
}

# Commands of several actions, each a module of its own.
ACTIONS = {
    "data": {
        "validate": "every bad row of record files, in one pass",
        "stats": "lengths, what a run makes of them, duplicates, leaks into evaluation",
        "build": "one data set out of many, with a part held out",
    },
    "eval": {
        "calibrate": "how judges agree with people's labels",
        "compare": "the paper's analyses over result files of any number of models",
        "curve": "how likely a refusal is after every token of given responses",
    },
}

USAGE = {
    "train": """\
usage: derta train [CONFIG.yaml] [--key value ...]

  --model            model folder, or a name on the model hub
  --sources          what to train on: '[{path: a.jsonl, role: safety}, ...]'; role: safety |
                     helpful | borderline; also weight, format, limit
  --eval_sources     what losses and refusal curves are reported of, likewise
  --output_dir       where checkpoints and the tuned model go
  --dry_run          show one pack and what its rows learn, train nothing
objective
  --recipe           vanilla | prefix_only | rto_only | derta: sets branches, cuts and rto_keep
  --refusal          refusal token: a word, a token id, or auto
  --branches         safe responses per triple and epoch, each after its own harmful prefix
  --cuts             zero | uniform | official | deep
  --rto_keep         share of harmful positions that are RTO targets, 0 to 1
  --rto_weight       weight of RTO in the loss
  --unlikelihood_weight   weight of -log(1 - p(next harmful token)) at RTO rows
  --rto_depth        uniform | growing, towards the end of the harmful response
  --loss_norm        tokens | official | terms
best checkpoint, by refusal curves of eval_sources: --metric_for_best_model trade_off
  --over_refusal_weight       w of trade_off, (1 - w) attack success + w over-refusal
  --early_stopping_patience   evaluations without a better one
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
--offload_checkpoints, --mlp_tile, --use_liger_kernel. A training run's CONFIG.yaml will do.
""",
    "eval": """\
usage: derta eval [CONFIG.yaml] [--key value ...]
       derta eval ACTION ..., one of calibrate, compare, curve

  --model            folder of a model or of adapters; several: '{before: a, after: b}'
  --output_dir       where report.html, summary.json and the pictures go; under answers/ what models
                     wrote, for its owner alone, from which an interrupted evaluation goes on
requests, in files of any known format; scenarios without requests are left out
  --harmful          to refuse, with the responses that attacks prefill
  --benign           harmless: over-refusal
  --borderline       harmless, and look harmful: over-refusal
  --helpful          harmless, with the right answers
  --helpful_metric   exact_match | perplexity
  --questions        scored by their final answer: '{gsm8k: gsm8k.jsonl, mmlu: mmlu.jsonl}'
  --formats          of files whose fields leave it open, or without a header:
                     '{hex-phi.csv: hex_phi}'
  --lm_eval          tasks of lm-eval, by name or as a YAML file: [ifeval, my-task.yaml]
attacks
  --prefill_depths   tokens of a harmful response that an attacker writes: [0, 4, 16]
  --templates        file of texts around a request, one a line, each with {request}
  --multi_turn       harmful conversations, of which the model answers every turn
  --attacks          prompts ready-made: '{codeattack: codeattack.jsonl, pair: pair.jsonl}'
  --max_new_tokens   longest answer
judges
  --judges           by name, the first is the main one: '{keyword: {}, guard: {kind: wildguard,
                     path: models/wildguard}}', see derta eval calibrate
  --keywords         what a judge by keyword takes for a refusal: [sorry, I cannot]
  --samples          answers shown in the report for each scenario; none by default
  --keep_answers     whether what was written to answers/ stays when all is done: true | false
refusal curve
  --curve            true | false
  --refusal          refusal token, as in training
machine
  --servers          models behind a server: '{after: {base_url: "http://localhost:8000/v1", model:
                     tuned}}'; its folder needs a tokenizer alone, and it has no refusal curves;
                     api_key_env: NAME of the variable with its key, OPENAI_API_KEY is OpenAI's only
  --batch_size --max_tokens --device --dtype --chat_template
""",
    "eval calibrate": """\
usage: derta eval calibrate FILE ... [--key value ...]

  --files            answers that people have labelled, JSON, JSONL, CSV or parquet: JailbreakBench
                     judge comparison, WildGuardTest, XSTest completions, or any with prompt,
                     response, label
  --judges           by name: '{keyword: {}, guard: {kind: wildguard, path: models/wildguard}}';
                     keyword | harmbench | wildguard | llama_guard | llm | classifier | server;
                     of a server, base_url, model, and api_key_env: NAME of the variable with its
                     key, OPENAI_API_KEY is sent to OpenAI alone
  --output_dir       where calibration.json goes
""",
    "eval compare": """\
usage: derta eval compare FILE_OR_FOLDER ... --output_dir FOLDER [--key value ...]

  --results          what each model left: a summary.json of derta eval or its folder, or result
                     files of the official repository; named: '{before: a, after: b}', one
                     model's by attack: '{before: {direct: a.json, completion: b.json}}', or by a
                     pattern, attacks called after folders: '{before: results/*/before_*.json}'
  --names            of the models, where results are not named: [before, after]
  --output_dir       where comparison.html, comparison.json and the pictures go
  --analysis         first_tokens | positions | terms | all
  --recipes          which model is which: '{vanilla: a, prefix_only: b, rto_only: c, derta: d}'
official result files
  --prompts          test files, where prompt and answer are one string
  --keywords         what the judge takes for a refusal: [sorry, I cannot]
  --tokenizer        folder of a tokenizer to count positions in tokens; without one, in words
  --keep_repeats     count repeated requests as often as they are there
""",
    "eval curve": """\
usage: derta eval curve MODEL DATA ... [--key value ...]

  The probability of a refusal after every token of given responses, without generating anything.

  --model            folder of a model or of adapters; the first argument
  --data             files of triples or dialogues; the other arguments
  --role             safety | helpful | borderline, as in training
  --output_dir       where curve.json, curve.png and curve.svg go
  --refusal          refusal token, as in training
  --max_tokens --device --dtype --chat_template
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
  --variants         vanilla, prefix_only, rto_only, derta, derta_balanced; not run unless
                     named: rto_only_growing, derta_growing, derta_balanced_growing
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
    "data": """\
usage: derta data ACTION ...

  validate           every bad row of record files, in one pass
  stats              lengths, what a run makes of them, duplicates, leaks into evaluation
  build              one data set out of many, with a part held out

derta data ACTION --help tells more.
""",
    "data validate": """\
usage: derta data validate FILE ... --role ROLE [--key value ...]

  Prints the place, field and reason of every bad row, then what each file has. Exits with 1 if any
  row is bad.

  --files            JSON Lines, JSON arrays, CSV or parquet, plain, gzip or xz; folders of them, or
                     as datasets saves them; the first arguments
  --role             what they are for. In training: safety | helpful | borderline; in evaluation:
                     harmful | harmless | question
  --format           name of their format, where their fields leave it open
""",
    "data stats": """\
usage: derta data stats [CONFIG.yaml] --sources SOURCES [--key value ...]

  Shows no text of any record. A training run's CONFIG.yaml will do.

  --sources          what a run trains on: '[{path: a.jsonl, role: safety, weight: 2}, ...]', with
                     format and limit as in training
  --eval_sources     what is not to be in it: '[{path: b.csv, role: harmful}, ...]', of a role in
                     training or harmful | harmless | question
  --output           a JSON file for all that is found
what a run makes of it
  --model            folder with a tokenizer, or a name on the model hub; without, characters count
  --recipe --refusal --branches --cuts --rto_keep --rto_weight --rto_depth --loss_norm
  --unlikelihood_weight
  --max_length --max_tokens --seed --chat_template      as in training
what comes again
  --near             share of their pairs of words that makes requests near, 0.5 to 1; null looks
                     for the same alone and takes 0.2 KB a request instead of 10
  --listed           how many of each kind are named, by id or place
""",
    "data build": """\
usage: derta data build [CONFIG.yaml] --sources SOURCES --output_dir FOLDER [--key value ...]

  Joins safe and harmful answers to one prompt, drops duplicates, holds a part out, and writes
  train.ROLE.jsonl, eval.ROLE.jsonl and build.json, readable by their owner alone. Prints the
  sources that train on it.

  --sources          what it is made of: '[{path: a.jsonl, role: safety, weight: 2}, ...]', with
                     format and limit as in training; weights go into the rows
  --output_dir       a folder that is not there yet, or is empty
  --eval_share       share of requests that are held out; the same one is never on both sides
  --seed             another one holds out others
  --near             training records whose request is as near as this to one that is held out are
                     left out, 0.5 to 1; null leaves them
  --refusal_text     completes harmful answers without a safe one, for trying things out
""",
}
