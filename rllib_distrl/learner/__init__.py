"""Learners: whole sequences in, one update of policy and critic out."""
