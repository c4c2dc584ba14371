# Read by scripts (`.`): tells uv, which reads neither pip's variables nor pip's configuration, where the CPU build of torch
# comes from: the folder PIP_FIND_LINKS, or the index TORCH_INDEX (a mirror, say), or else PyTorch's own CPU index.
if [ -n "${PIP_FIND_LINKS:-}" ]; then
  torch="of $PIP_FIND_LINKS (PIP_FIND_LINKS)"
  export UV_FIND_LINKS="$PIP_FIND_LINKS"
elif [ -n "${TORCH_INDEX:-}" ]; then
  torch="of $TORCH_INDEX (TORCH_INDEX)"
  export UV_EXTRA_INDEX_URL="$TORCH_INDEX" UV_INDEX_STRATEGY=unsafe-best-match
else
  torch="of PyTorch's index, https://download.pytorch.org/whl/cpu"
  export UV_TORCH_BACKEND=cpu
fi
