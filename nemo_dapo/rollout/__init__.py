"""Rollouts by vLLM servers over HTTP. `engine.VLLMEngine` is the door; nothing here imports vLLM except the files
`vllm_*`, which only a server loads."""
