"""From response text to Verdict: the math verifiers, and the pool of killable workers that runs them.

    pool (trainer process) -> worker (child process) -> function: math.verify, math_dapo.verify, a user's own, or remote

Kept empty: a worker imports this package, and must start without torch.
"""
