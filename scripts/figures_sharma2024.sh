#!/usr/bin/env bash
# The counterparts of figures 1, 2, 3 and 5 to 8 of arXiv 2406.14005, with the controls that they lack:
# masks of entries beside masks of whole parameters, directions of equal size, random masks, several directions.
#
#   scripts/figures_sharma2024.sh OUT DATA MODEL [FLAG ...]
#   scripts/figures_sharma2024.sh figures/sharma2024/bert builtin:docs builtin:bert
#   scripts/figures_sharma2024.sh figures/sharma2024/gpt2 wikitext.txt gpt2 --device cuda
#
# The flags go to every command that loads the model. POINTS, FEWER (points of the many curves of figure 2), EXAMPLES,
# SPAN, REPLICATES and SHARES may be set in the environment. A run that was stopped goes on where it was; commands.txt in
# the folder is what was run.
set -euo pipefail

out=$1 data=$2 model=$3
flags=("${@:4}")
: "${POINTS:=17}" "${FEWER:=11}" "${EXAMPLES:=48}" "${SPAN:=0.8}" "${REPLICATES:=8}" "${SHARES:=0.05 0.1 0.2 0.4}"
mkdir -p "$out"
: > "$out/commands.txt"

fisherscope() {
  echo "fisherscope $*" | sed "s|$out/||g" >> "$out/commands.txt"
  command fisherscope "$@"
}
source=(--model "$model" --data "$data" ${flags[@]+"${flags[@]}"})
scan=(landscape "${source[@]}" --num-examples "$EXAMPLES" --span "$SPAN")
surface=("${scan[@]}" --points "$POINTS" --clip --resume)
curve=("${scan[@]}" --axes 1 --replicates "$REPLICATES" --scores "$out/by_token.h5" --resume)

# Scores: as published (sequences, labels of the data), and those that predict the loss (tokens, labels drawn)
fisherscope fisher "${source[@]}" --num-examples 512 --out "$out/scores.h5" --resume
fisherscope fisher "${source[@]}" --num-examples 128 --unit token --estimator sampled --draws 2 \
  --out "$out/by_token.h5" --resume

# Masks: halves of the parameters as published, and shares of the entries
mask() { [ -e "$out/$1.safetensors" ] || fisherscope mask "$out/scores.h5" "${@:2}" --out "$out/$1.safetensors"; }
for select in top bottom; do
  mask "published_$select" --published sharma2024 --select $select
done
for select in top bottom random; do
  mask "${select}_0.5" --fraction 0.5 --select $select --within parameter
done
for share in $SHARES; do
  mask "top_$share" --fraction "$share" --select top
  mask "random_$share" --fraction "$share" --select random --within parameter
done

# Figure 1: surfaces when all, the upper and the lower half of the parameters move; below, the controls
fisherscope "${surface[@]}" --out "$out/surface_all.h5"
for select in top bottom; do
  fisherscope "${surface[@]}" --mask "$out/published_$select.safetensors" --out "$out/surface_published_$select.h5"
done
for select in top random bottom; do
  fisherscope "${surface[@]}" --mask "$out/${select}_0.5.safetensors" --match norm --out "$out/surface_$select.h5"
done
published=("$out"/surface_{all,published_top,published_bottom}.h5)
controls=("$out"/surface_{top,random,bottom}.h5)
for kind in surface contour; do
  fisherscope plot "${published[@]}" --kind $kind --titles "all" "upper half of the parameters" \
    "lower half of the parameters" --out "$out/figure1_${kind}.png" --overwrite
  fisherscope plot "${controls[@]}" --kind $kind --titles "top 50 % of the entries" "random 50 %" "bottom 50 %" \
    --out "$out/figure1_controls_${kind}.png" --overwrite
done

# Figure 2: curves along several directions for narrower and narrower masks, raw and of equal size
half=()
for select in top random bottom; do
  fisherscope "${curve[@]}" --points "$POINTS" --mask "$out/${select}_0.5.safetensors" --match norm --out "$out/curve_${select}_0.5.h5"
  half+=("$out/curve_${select}_0.5.h5")
done
fisherscope plot "${half[@]}" --titles "top 50 %" "random 50 %" "bottom 50 %" --out "$out/figure2_halves.png" --overwrite
fisherscope info "${half[@]}" > "$out/figure2_halves.txt"
for match in none norm; do
  narrow=() titles=()
  for share in $SHARES; do
    fisherscope "${curve[@]}" --points "$FEWER" --mask "$out/top_$share.safetensors" --match $match --out "$out/curve_top_${share}_$match.h5"
    narrow+=("$out/curve_top_${share}_$match.h5") titles+=("top $share")
  done
  for share in $SHARES; do
    if [ $match = none ]; then # a random mask is as large either way
      fisherscope "${curve[@]}" --points "$FEWER" --mask "$out/random_$share.safetensors" --out "$out/curve_random_$share.h5"
    fi
    narrow+=("$out/curve_random_$share.h5") titles+=("random $share")
  done
  fisherscope plot "${narrow[@]}" --titles "${titles[@]}" --out "$out/figure2_$match.png" --overwrite
  fisherscope info "${narrow[@]}" > "$out/figure2_$match.txt"
done

# Figures 3, 5 and 6 to 8: scores of entries and of parameters, sorted and in the model's order
for by in entry parameter; do
  fisherscope plot "$out/scores.h5" --kind sorted --by $by --normalized --out "$out/figure3_$by.png" --overwrite
done
fisherscope plot "$out/scores.h5" --kind sorted --by entry --out "$out/figure5.png" --overwrite
fisherscope plot "$out/scores.h5" --kind sorted --by parameter --out "$out/figure6_sorted.png" --overwrite
fisherscope plot "$out/scores.h5" --kind parameters --out "$out/figure6_model_order.png" --overwrite
