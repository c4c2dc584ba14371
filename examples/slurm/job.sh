# shellcheck shell=bash
# What the job files of this folder share; they source it in the folder of the checkout.

run_dir=${RUN_DIR:-runs/$SLURM_JOB_NAME}   # on a disk that every node sees
head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export RUN_DIR=$run_dir HEAD_NODE=$head_node
export PORT=${PORT:-$((20000 + SLURM_JOB_ID % 20000))}  # of torchrun's rendezvous; another job's on the same node is another
export PYTHON=${PYTHON:-python}     # with torch, NeMo and Megatron; in a container, the path there
# export VLLM_PYTHON=/opt/vllm/bin/python   # where vLLM has an environment of its own, as in the image of our Dockerfile
# export INTERFACE=ib0                      # where the hosts' names lead to another network than the one to be used

container=()
if [[ -n ${CONTAINER:-} ]]; then    # an image for pyxis, such as nemo_dapo.sqsh
    container=(--container-image="$CONTAINER" --container-mounts="$PWD:$PWD,${MOUNTS:-/dev/shm:/dev/shm}" --container-workdir="$PWD")
fi

newest_checkpoint() {
    local found=("$run_dir"/checkpoints/step_??????)
    echo "${found[-1]}"
}

# Ends the job unless every node can do its part; each one says what it lacks.
check_nodes() {
    mkdir -p "$run_dir"
    echo "$SLURM_JOB_ID" > "$run_dir/.node_check"
    srun --ntasks-per-node=1 --kill-on-bad-exit=0 "${container[@]}" bash examples/slurm/node_check.sh || {
        echo "the nodes named above cannot run this job: mend them, or leave them out by sbatch --exclude=NODE" >&2
        exit 1
    }
    rm -f "$run_dir"/.{asked_to_stop,failed} "$run_dir/rollout.json" # an earlier run's, which agents would look for
    checkpoint_before=$(newest_checkpoint)
}

# Ends the job with the trainer's exit status, or sends it back to the queue where starting it again will get it further:
# when it was asked to stop before any rank failed, and when it failed after a new checkpoint.
end_or_requeue() {
    local status=$1
    echo "exit status $status, newest checkpoint $(newest_checkpoint)"
    local asked=no
    [[ ! -e $run_dir/.asked_to_stop || -e $run_dir/.failed ]] || asked=yes
    if [[ $status != 0 && ($asked == yes || $(newest_checkpoint) != "$checkpoint_before") ]]; then
        echo "back to the queue, where it was ${SLURM_RESTART_COUNT:-0} times before"
        scontrol requeue "$SLURM_JOB_ID"
        status=0
    fi
    exit "$status"
}
