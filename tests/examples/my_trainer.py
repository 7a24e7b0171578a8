"""A trainer: regression.

PYTHONPATH=tests/examples python offline_trainer.py --plugins my_data my_trainer --dataset my_data --trainer my_trainer
"""

from components import TRAINER_REGISTRY


class MyTrainer:
    def __init__(self, models, optimizers, loss, device):
        self.models, self.optimizers, self.loss, self.device = models, optimizers, loss, device

    def train_step(self, data):
        loss = self.loss(self.models["policy"](data["observation.state"]), data["action"])
        self.optimizers["policy"].zero_grad()
        loss.backward()
        self.optimizers["policy"].step()
        return {"loss": loss}


TRAINER_REGISTRY["my_trainer"] = MyTrainer
