"""Losses that mean harm, by what they go for. An attack that got somewhere returns what it got."""
