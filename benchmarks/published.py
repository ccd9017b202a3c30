"""Scores of other people's reports, for orientation only: no two of them share a protocol, none shares ours.

What is marked as second-hand was taken from texts that quote the paper, not from the paper itself.
"""

from __future__ import annotations

from dataclasses import dataclass

PAPER_AR = "CogVideo, arXiv 2205.15868; second-hand, two summaries agree"
TABLES_AR = "second-hand: tables of VideoLDM, W.A.L.T, Goku and LaVie, copied from paper to paper"
PAPER_X = "CogVideoX, arXiv 2408.06072"
BOARD = "VBench leaderboard; second-hand, the tables of two later papers agree"


@dataclass(frozen=True, kw_only=True)
class Published:
    """One reported score. `conflict` names what contradicts it."""

    model: str
    protocol: str
    score: str
    source: str
    conflict: str = ""


PUBLISHED = (
    Published(
        model="CogVideo",
        protocol="UCF-101, fine-tuned 10,000 steps, class label as text; FVD of 2,048, IS of 10,000 samples",
        score="FVD 626 (545 against data passed through its tokenizer), IS 50.46",
        source=PAPER_AR,
        conflict="a leaderboard site lists FVD16 305 and IS 51.11 for 128 x 128; where from is unclear",
    ),
    Published(
        model="CogVideo",
        protocol="Kinetics-600, fine-tuned 12,000 steps, 16 frames of which 5 are given",
        score="FVD 109.23 (59.55 against data passed through its tokenizer)",
        source=f"{PAPER_AR}; 109.2 also in Phenaki's table",
    ),
    Published(
        model="CogVideo",
        protocol="UCF-101, not fine-tuned",
        score="FVD 751.34, IS 23.55 (Chinese prompts); FVD 701.59, IS 25.27 (English)",
        source=TABLES_AR,
        conflict="one later table prints FVD 710.59",
    ),
    Published(
        model="CogVideo",
        protocol="MSR-VTT, not fine-tuned",
        score="CLIPSIM 0.2614 (Chinese), 0.2631 (English); FID 24.78, 23.59; FVD 1294 (English)",
        source=TABLES_AR,
    ),
    Published(
        model="CogVideo",
        protocol="preferred by 90 people, 30 classes of UCF-101",
        score="49.53 % (VideoGPT 15.42 %, TGANv2 5.6 %)",
        source=PAPER_AR,
    ),
    Published(
        model="CogVideoX-2B",
        protocol="five dimensions of VBench, dynamic quality (DEVIL), MTScore",
        score="human action 96.6, scene 55.35, dynamic degree 66.39, multiple objects 57.68, "
        "appearance 24.37; 57.7; 3.09",
        source=f"{PAPER_X}, Table 3",
        conflict="the leaderboard has 98.00, 51.14, 59.86, 62.63, 24.80; total 80.91",
    ),
    Published(
        model="CogVideoX-5B",
        protocol="the same",
        score="human action 96.8, scene 55.44, dynamic degree 62.22, multiple objects 70.95, "
        "appearance 24.44; 69.5; 3.36",
        source=f"{PAPER_X}, Table 3",
        conflict="the leaderboard has 99.40, 53.20, 70.97, 62.11, 24.91 for the same weights",
    ),
    Published(
        model="CogVideoX-5B",
        protocol="VBench, all 16 dimensions",
        score="total 81.61 (quality 82.75, semantic 77.04)",
        source=BOARD,
    ),
    Published(
        model="CogVideoX1.5-5B",
        protocol="VBench, all 16 dimensions",
        score="total 82.17 (quality 82.78, semantic 79.76); dynamic degree 50.93",
        source=BOARD,
    ),
    Published(
        model="CogVideoX-5B",
        protocol="people, 100 prompts, four questions, against Kling (2024.7)",
        score="2.74 against 2.17",
        source=f"{PAPER_X}, Table 4",
        conflict="the four parts of 2.74 in the same table add up to 2.60",
    ),
    Published(
        model="CogVideoX VAE",
        protocol="WebVid validation, 17 frames of 256 x 256",
        score="PSNR 29.1 dB, flicker 85.5",
        source=f"{PAPER_X}, Table 2",
    ),
    Published(
        model="CogVideoX-2B",
        protocol="H800, 50 steps, 6 s of 480 x 720",
        score="49 s, 18 GB",
        source=f"{PAPER_X}, Table 7",
    ),
    Published(
        model="CogVideoX-5B",
        protocol="H800, 50 steps, 6 s of 480 x 720; 5 s of 768 x 1360",
        score="113 s, 26 GB; 500 s, 76 GB",
        source=f"{PAPER_X}, Table 7",
    ),
)
