"""Samples: a bounded choice of the rows that models were least sure of, kept where that is allowed and asked for."""
