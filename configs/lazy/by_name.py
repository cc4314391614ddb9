"""The experiment that its own name describes: every config in the folders beside is this file.

They are links to it, so that a path says everything: ``LazyConfig.load``, Detectron2's own
``lazyconfig_train_net.py`` and the completion of a shell know them, and there is one file to read.
``common/zoo.py`` says what the parts of a name stand for.
"""

from ..common.zoo import by_name

dataloader, lr_multiplier, model, optimizer, train = by_name(__file__)
