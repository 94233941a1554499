"""`python -m fedgraft`: the command line."""

if __name__ == "__main__":
    from fedgraft.cli import main

    main()
