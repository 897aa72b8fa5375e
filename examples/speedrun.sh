#!/usr/bin/env bash
# From raw text to a chat model with a report: continual pretraining, chat vector, fine-tuning on conversations.
#
#   TARGET=ko.jsonl SOURCE=en.jsonl examples/speedrun.sh                # a small model on a CPU, under an hour
#
# Two settings scale it to a GPU, the model and the number of tokens:
#
#   MODEL=meta-llama/Llama-3.2-1B TOKENS=1_000_000_000 TARGET=... SOURCE=... examples/speedrun.sh
#
# TARGET and SOURCE are JSON lines with a `text` field (also .gz, .zst, .parquet, or folders of them). CHAT is the chat
# model that was made from MODEL. TALK_TARGET and TALK_SOURCE are conversations (docs/chat.md); without them, a few dozen
# generated ones in Korean and English show the form. Needs the extra `chat`.
set -euo pipefail
MODEL="${MODEL:-HuggingFaceTB/SmolLM2-135M}"
CHAT="${CHAT:-$MODEL-Instruct}"
TOKENS="${TOKENS:-200_000}"
TARGET="${TARGET:?set TARGET to text in the target language}"
SOURCE="${SOURCE:?set SOURCE to text in the source language}"
TARGET_LANGUAGE="${TARGET_LANGUAGE:-ko}"  # ISO 639-1 codes, so that the language of answers can be identified
SOURCE_LANGUAGE="${SOURCE_LANGUAGE:-en}"
OUT="${OUT:-runs/speedrun}"
if (( ${TOKENS//_/} < 10000000 )); then
    LENGTH=512 STEP=4096 CHAT_STEP=1024 HELDOUT_BYTES=20000 HELDOUT_SHARE=0.03
else
    LENGTH=4096 STEP=524288 CHAT_STEP=65536 HELDOUT_BYTES=400000 HELDOUT_SHARE=0.005
fi
mkdir -p "$OUT"

# 1. How many tokens does the target language take, and would new vocabulary pieces pay?
elo vocab measure "$MODEL" --corpus "$TARGET_LANGUAGE=$TARGET" --corpus "$SOURCE_LANGUAGE=$SOURCE" \
    --target "$TARGET_LANGUAGE" --max-characters 2000000

# 2. Conversations for the fine-tuning.
if [ -z "${TALK_TARGET:-}" ]; then
    python3 "$(dirname "$0")/conversations.py" "$OUT"
    TALK_TARGET="$OUT/chat_ko.jsonl" TALK_SOURCE="$OUT/chat_en.jsonl"
fi

# 3. One configuration file. `elo config` lists every key.
cat > "$OUT/run.yaml" <<YAML
model: $MODEL
output: $OUT/run
method: lora
tokens: $TOKENS
data:
  target: $TARGET_LANGUAGE
  source: $SOURCE_LANGUAGE
  corpora: {$TARGET_LANGUAGE: "$TARGET", $SOURCE_LANGUAGE: "$SOURCE"}
  heldout_share: $HELDOUT_SHARE  # at least 30 documents a language
  sequence_length: $LENGTH
training: {tokens_per_step: $STEP}
evaluation: {max_bytes: $HELDOUT_BYTES, in_context: true}
chat:
  model: $CHAT
  data: {$TARGET_LANGUAGE: "$TALK_TARGET", $SOURCE_LANGUAGE: "$TALK_SOURCE"}
  sequence_length: $LENGTH
  training: {tokens_per_step: $CHAT_STEP}
YAML

# 4. Will it fit, and how long will it take? Nothing is loaded.
elo plan "$OUT/run.yaml"

# 5. Prepare, train, add the chat vector, fine-tune, measure before and after each step, report. Kill it at any time:
#    the same command resumes it. Further keys can follow, for example: examples/speedrun.sh --set chat.epochs=3
elo run "$OUT/run.yaml" "$@"

echo "report: $OUT/run/report.html; adapted model: $OUT/run/model; chat model: $OUT/run/chat"
