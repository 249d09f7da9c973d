"""What a cut protects: attacks, scores and defences, a mechanism a file, each named for its publication.

    target = Target(half, server, private, labels, public, public_labels)
    assessment, images = assess("decoder", DecoderInversion(), target)

docs/privacy.md says who sees what, and what is not promised.
"""

from cutlayer.privacy.advise import Advice, advise
from cutlayer.privacy.assess import ATTACKS, Assessment, assess, frame_leak, get_attack, label_leak
from cutlayer.privacy.decoder import DecoderInversion
from cutlayer.privacy.defence import Defence
from cutlayer.privacy.fsha import FSHA, Hijacker
from cutlayer.privacy.gallery import save_gallery
from cutlayer.privacy.known_half import KnownHalf
from cutlayer.privacy.noise import Noise
from cutlayer.privacy.scores import Spread, distance_correlation, mse, psnr, ssim
from cutlayer.privacy.sdar import SDAR, Simulation
from cutlayer.privacy.target import Attack, Target, mean_image
from cutlayer.privacy.unsplit import UnSplit

__all__ = [
    "ATTACKS",
    "FSHA",
    "SDAR",
    "Advice",
    "Assessment",
    "Attack",
    "DecoderInversion",
    "Defence",
    "Hijacker",
    "KnownHalf",
    "Noise",
    "Simulation",
    "Spread",
    "Target",
    "UnSplit",
    "advise",
    "assess",
    "distance_correlation",
    "frame_leak",
    "get_attack",
    "label_leak",
    "mean_image",
    "mse",
    "psnr",
    "save_gallery",
    "ssim",
]
