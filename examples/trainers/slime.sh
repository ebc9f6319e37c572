imm-loop base --rounds 3 -o run --train 'python3 train.py --hf-checkpoint {model} --ref-load {model} \
    --load {output}.megatron --save {output}.megatron --save-interval 20 --save-hf {output} \
    --num-rollout 100 --prompt-data data.jsonl --input-key prompt --label-key completion && rm -r {output}.megatron'
