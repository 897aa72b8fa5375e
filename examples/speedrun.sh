#!/usr/bin/env bash
# From raw text to an adapted chat model, step by step. Two settings scale it: the model and the token budget.
#
#   TARGET=ko.jsonl SOURCE=en.jsonl examples/speedrun.sh
#
# TARGET and SOURCE are JSON lines with a `text` field (also .gz, .zst, .parquet, or folders of them). CHAT is the chat
# model that was trained from MODEL, if there is one.
set -euo pipefail
MODEL="${MODEL:-meta-llama/Llama-3.2-1B}"
CHAT="${CHAT:-meta-llama/Llama-3.2-1B-Instruct}"
TOKENS="${TOKENS:-200_000_000}"
STEP="${STEP:-65536}"          # tokens of an update
LENGTH="${LENGTH:-2048}"       # tokens of a sequence
TARGET="${TARGET:?set TARGET to text in the target language}"
SOURCE="${SOURCE:?set SOURCE to text in the source language}"
OUT="${OUT:-runs/speedrun}"
mkdir -p "$OUT"

# 1. How many tokens does the target language take, and would new vocabulary pieces pay?
elo vocab measure "$MODEL" --corpus target="$TARGET" --corpus source="$SOURCE" --target target

# 2. One configuration file. `elo config` lists every key.
cat > "$OUT/run.yaml" <<YAML
model: $MODEL
output: $OUT/run
method: lora
tokens: $TOKENS
data:
  target: target
  source: source
  corpora: {target: "$TARGET", source: "$SOURCE"}
  sequence_length: $LENGTH
training: {tokens_per_step: $STEP}
YAML

# 3. Will it fit, and how long will it take? Nothing is loaded.
elo plan "$OUT/run.yaml"

# 4. Prepare, train, measure before and after, report. Kill it at any time: the same command resumes it.
elo run "$OUT/run.yaml"

# 5. Chat ability back: add what chat training changed in the base, and the chat template.
elo chat-vector "$OUT/run/model" --base "$MODEL" --chat "$CHAT" --output "$OUT/chat"

echo "report: $OUT/run/report.html; adapted model: $OUT/run/model; chat model: $OUT/chat"
