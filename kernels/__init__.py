"""The two fused attention operators. Each folder holds one operator in several forms with one meaning."""
