"""What runs while a GPU machine is lent for minutes: `lease.sh`, `lease_2.sh`, and a module for each of their steps."""
