"""Selective state-space scans: the order in which patches are visited, the scan itself, the bidirectional block."""

from meteor.ssm.backends import BACKENDS, resolve_backend, selective_scan
from meteor.ssm.block import BidirectionalScan, BidirectionalSSM
from meteor.ssm.scan_order import ScanIndex, scan_index, scan_sequence

__all__ = [
    "BACKENDS",
    "BidirectionalSSM",
    "BidirectionalScan",
    "ScanIndex",
    "resolve_backend",
    "scan_index",
    "scan_sequence",
    "selective_scan",
]
