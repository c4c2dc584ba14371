"""The way of the weights from the trainer's ranks to every server; see `plan.py` for who sends what to whom."""
