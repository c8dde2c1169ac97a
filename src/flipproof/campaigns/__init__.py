"""Campaigns: golden run, trials, records, statistics."""

from flipproof.campaigns.assessment import Assessment
from flipproof.campaigns.campaign import assess
from flipproof.campaigns.statistics import sample_size

__all__ = ["Assessment", "assess", "sample_size"]
