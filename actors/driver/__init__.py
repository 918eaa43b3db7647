"""The PPO loop and what keeps it going: schedule, rollouts, recovery, evaluation."""
