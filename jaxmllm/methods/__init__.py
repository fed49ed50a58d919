"""Methods of answering under one roof: contrastive attention, its rivals, and the controls that they need.

>>> method = jaxmllm.methods.ContrastiveReinput(fusion_layers=[2, 4, 8, 11, 12, 13])
>>> answers = jaxmllm.answer(model, images, questions, method=method)
"""

from jaxmllm.methods.base import Method, Second
from jaxmllm.methods.carve import Carve
from jaxmllm.methods.contrastive import ContrastiveReinput, ReviewMask
from jaxmllm.methods.controls import CentreCrop, EvidenceCrop, RandomCrop, SecondLook
from jaxmllm.methods.dola import Dola
from jaxmllm.methods.knockout import AttentionKnockout
from jaxmllm.methods.names import METHODS, parse_method, spell
from jaxmllm.methods.opera import Opera
from jaxmllm.methods.vcd import Vcd
from jaxmllm.methods.vicrop import ViCrop

__all__ = [
    "METHODS",
    "AttentionKnockout",
    "Carve",
    "CentreCrop",
    "ContrastiveReinput",
    "Dola",
    "EvidenceCrop",
    "Method",
    "Opera",
    "RandomCrop",
    "ReviewMask",
    "Second",
    "SecondLook",
    "Vcd",
    "ViCrop",
    "parse_method",
    "spell",
]
