"""``python -m sb3_dppo.demonstrations``: inspect, convert and collect demonstrations."""

from sb3_dppo.demonstrations.demonstrations import main

if __name__ == "__main__":
    main()
