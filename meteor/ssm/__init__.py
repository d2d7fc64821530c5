"""Selective state-space scans: the order in which patches are visited, the scan itself, the bidirectional block."""

from meteor.ssm.backends import BACKENDS, check_backend, resolve_backend, selective_scan
from meteor.ssm.block import BidirectionalScan, BidirectionalSSM
from meteor.ssm.scan_order import ScanIndex, ScanOrder, scan_index, scan_order, scan_sequence

__all__ = [
    "BACKENDS",
    "BidirectionalSSM",
    "BidirectionalScan",
    "ScanIndex",
    "ScanOrder",
    "check_backend",
    "resolve_backend",
    "scan_index",
    "scan_order",
    "scan_sequence",
    "selective_scan",
]
