# nemo_dapo in NVIDIA's NeMo container: its torch, Transformer Engine, apex, Megatron-core and Megatron-Bridge stay as they are.
#   docker build -t nemo_dapo .
#   docker run --rm --gpus all --ipc=host --ulimit memlock=-1 --ulimit stack=67108864 \
#     -v /models:/models -v "$PWD/runs:/opt/nemo_dapo/runs" nemo_dapo python3 -m torch.distributed.run --nproc-per-node 8 \
#     examples/train_dapo.py model.path=/models/Qwen2.5-7B preset=qwen2.5-7b/gpus8 data=dapo_math_17k reward=dapo
# --ipc=host: Docker's 64 MiB of /dev/shm are too little for NCCL, for vLLM's queues and for the weights.
FROM nvcr.io/nvidia/nemo:26.06
ENV UV_NO_CACHE=1
WORKDIR /opt/nemo_dapo
COPY requirements/container.sh requirements/ngc.txt requirements/

# In an environment of its own (rollout.python): trainer and servers need not agree on a torch version.
RUN sh requirements/container.sh vllm /opt/vllm

# /opt/venv/bin/python is the container's python3, the one with Megatron.
COPY . .
RUN sh requirements/container.sh trainer /opt/venv/bin/python \
 && sh requirements/container.sh package /opt/venv/bin/python /opt/vllm/bin/python

RUN sh requirements/container.sh check /opt/venv/bin/python \
      torch transformer_engine megatron.core megatron.bridge nemo_dapo.trainer nemo_dapo.controller nemo_dapo.megatron.policy \
 && sh requirements/container.sh check /opt/vllm/bin/python vllm nemo_dapo.rollout.vllm_plugin
# Empty, the servers run on the container's own vLLM.
ENV VLLM_PYTHON=/opt/vllm/bin/python
