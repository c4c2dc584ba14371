"""The only room that imports Megatron: the policy, its log-probabilities, attention, weights and the CPU host's shim."""
