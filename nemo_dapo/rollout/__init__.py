"""Rollouts by vLLM servers over HTTP. `engine.VLLMEngine` is the door; nothing here imports vLLM except `vllm_plugin`,
which only a server loads."""
