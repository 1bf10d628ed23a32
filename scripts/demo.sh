#!/bin/sh
# Trains a small model on Python's own documentation, and lets it talk. Needs no network.
set -eu
run=runs/demo

if [ -f "$run/model/config.json" ]; then
    echo "$run holds a trained model already: using it. Remove the folder to train again."
elif [ -f "$run/config.yaml" ] && { [ -f "$run/lock" ] || [ -n "$(ls "$run/checkpoints" 2>/dev/null)" ]; }; then
    echo "$run was interrupted: continuing it."
    bdh train --run_dir "$run" --resume
else
    if [ -f "$run/config.yaml" ]; then
        echo "$run was interrupted before its first checkpoint: training anew."
        rm -r "$run"
    fi
    bdh train --config configs/tiny.yaml --run_dir "$run"
fi

for prompt in "The " "A class is " "If the file "; do
    echo
    echo "--- bdh generate $run/model --prompt '$prompt'"
    bdh generate "$run/model" --prompt "$prompt" --max_new_tokens 80 --temperature 0.7 --seed 1
done

echo
bdh plot "$run" --output "$run/loss.png"
cat <<END

What next, after ". .venv/bin/activate":
  bdh generate $run/model --prompt "import " --max_new_tokens 80  more text
  bdh eval $run                                                   loss, perplexity, bits per byte
  tensorboard --logdir $run/tensorboard                           the curves of the run
  bdh train --config configs/small.yaml --data.source FILE             a larger model on a text of yours
  bdh train --help                                                     every setting
END
